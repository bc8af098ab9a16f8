"""What ends a text besides stop tokens and budgets: stop strings, and transformers' stopping criteria."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria

if TYPE_CHECKING:
    from specdec.loop import Decoding


class Stopping(Protocol):
    """Asked after every step."""

    def ask(self, run: Decoding) -> None:
        """End the rows of `run` that are to end."""


class StopStrings:
    """Ends a text at the token that completes one of these strings.

    Args:
        tokenizer: that of the text.
        strings: the strings.
    """

    def __init__(self, tokenizer: Any, strings: Any):
        self._complete: Any = StopStringCriteria(tokenizer, strings)

    def ask(self, run: Decoding) -> None:
        for row, count in enumerate(run.trace.steps[-1].emitted):
            text = torch.from_numpy(run.batch.texts[row])[None]
            for beyond in reversed(range(count)):
                if self._complete(text[:, : text.shape[1] - beyond], None):
                    run.end(row, len(run.emitted[row]) - beyond)
                    break


class Criteria:
    """transformers' stopping criteria, asked as it asks them: about the whole batch, once for every length of its texts.

    Rows grow by unequal steps here. A length is asked about as soon as every row that may reach it has. What faster rows have
    beyond the length at which they are found to have ended is cut again: it depends on no other row.

    Args:
        criteria: called with texts [batch, prompt + length] and None, for length 1, 2, ... in order.
        prompts: [batch, prompt] int64, with their padding.
        pad_token: stands after texts that have ended.
        pads: whether a row ends when a criterion says so. If not (transformers without EOS), all go on until each has once
            been told to end.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompts: Tensor, pad_token: int, pads: bool):
        self._criteria, self._prompts, self._pad_token, self._pads = criteria, prompts, pad_token, pads
        self._length = 0  # of new tokens, about which the criteria were asked last
        self._told = [False] * len(prompts)  # rows that were told to end

    def ask(self, run: Decoding) -> None:
        """About the lengths that the last step of `run` has made known, and end the rows that are to."""
        while (rows := self._reaching(run, self._length + 1)) and not all(self._told):
            self._length += 1
            flags = self._criteria(self._texts(run), None).tolist()  # type: ignore[arg-type] - its stub wants LongTensor
            self._told = [told or flag for told, flag in zip(self._told, flags, strict=True)]
            for row in rows:
                if self._told[row] if self._pads else all(self._told):
                    run.end(row, self._length)

    def _reaching(self, run: Decoding, length: int) -> list[int]:
        """The rows whose texts reach a length; none as long as it is not known of each."""
        sizes = list(map(len, run.emitted))
        if any(running and size < length for running, size in zip(run.running, sizes, strict=True)):
            return []
        return [row for row, size in enumerate(sizes) if size >= length]

    def _texts(self, run: Decoding) -> Tensor:
        rows = [text[: self._length] for text in run.emitted]
        new = [row + [self._pad_token] * (self._length - len(row)) for row in rows]
        return torch.cat([self._prompts, torch.tensor(new).to(self._prompts)], 1)
