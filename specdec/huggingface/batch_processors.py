"""Logits processors that transformers has made for a batch: they may count padding, and tell rows apart by their place."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from specdec.processors import Processors


class BatchProcessors(Processors):
    """The processors of one row, where processors see the whole batch and may keep state for each of its rows.

    The other rows' texts of the same length are not known. The likeliest tokens that the processors allow stand in for them,
    so that a processor with a grammar for every row is shown no text that its grammar excludes.

    Args:
        processors: the processors of the batch.
        row: the row whose scores are wanted.
        length: the length of its prompt, without the padding before it.
        prompts: [batch, prompt] int64, with their padding.
        ends: [n] int64: tokens that end a text.
        filler: the token that fills a row after its text has ended.
    """

    def __init__(self, processors: Sequence[Any], row: int, length: int, prompts: Tensor, ends: Tensor, filler: int):
        super().__init__(processors)
        self._row, self._padding = row, prompts.shape[1] - length
        self._texts = prompts  # [batch, length] int64: the texts to show next; the row's own tokens are filled in then
        self._over = torch.zeros(len(prompts), dtype=torch.bool)  # [batch]: texts that have ended
        self._ends, self._filler = ends, filler

    def __call__(self, text: Tensor, scores: Tensor, last: bool = False) -> tuple[Tensor, Processors]:
        after, device = copy(self), text.device
        missing = self._padding + len(text) - self._texts.shape[1]
        texts = torch.nn.functional.pad(self._texts, (0, missing), value=self._filler).to(device)
        texts[self._row, self._padding :] = text
        after.processors, scores = self._called(texts, scores.repeat(len(texts), 1), last)
        after._lent = False
        over = self._over.to(device)
        following = scores.argmax(1).where(~over, self._filler)
        after._over = over | torch.isin(following, self._ends.to(device))
        after._texts = torch.cat([texts, following[:, None]], 1)
        return scores[self._row : self._row + 1], after
