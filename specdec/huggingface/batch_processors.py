"""Logits processors that transformers has made for a batch: they may count padding and know the rows by their place."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from specdec.processors import Processors


class BatchProcessors(Processors):
    """One row's, of processors that are shown the whole batch and may keep something of each row of it.

    The texts of the other rows are not known for this length. Each goes on with the likeliest tokens that the processors
    leave it, so that one that keeps a grammar for every row is shown no text that the grammar excludes.

    Args:
        processors: of the batch.
        row: the one that they process.
        length: of its prompt, without the padding before it.
        prompts: [batch, prompt] int64, with their padding.
        ends: [n] int64: tokens that end a text.
        filler: the token that stands after those.
    """

    def __init__(self, processors: Sequence[Any], row: int, length: int, prompts: Tensor, ends: Tensor, filler: int):
        super().__init__(processors)
        self._row, self._padding = row, prompts.shape[1] - length
        self._texts = prompts  # [batch, length] int64: what is shown next, but for the row's own tokens
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
