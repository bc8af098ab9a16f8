"""What ends a text besides stop tokens and budgets: stop strings, and transformers' stopping criteria."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria

if TYPE_CHECKING:
    from specdec.loop import Decoding


class Stopping(Protocol):
    """Ends texts; the loop asks it after every step."""

    def ask(self, run: Decoding) -> None:
        """Call `run.end` for the texts that are to end."""


class StopStrings:
    """Ends a text at the token that completes one of these strings.

    Args:
        tokenizer: the target's.
        strings: one string, or several.
    """

    def __init__(self, tokenizer: Any, strings: Any):
        self.tokenizer = tokenizer
        self._complete: Any = StopStringCriteria(tokenizer, strings)

    def ask(self, run: Decoding) -> None:
        for row, count in enumerate(run.trace.steps[-1].emitted):
            text = torch.from_numpy(run.batch.text(row))[None]
            for beyond in reversed(range(count)):
                if self._complete(text[:, : text.shape[1] - beyond], None):
                    index = run.held[row]
                    run.end(index, len(run.tokens(index)) - beyond)
                    break


class Criteria:
    """transformers' stopping criteria, called as transformers does: on the whole batch, once for every length of its texts.

    Rows grow by unequal steps here. The criteria are called for a length once every row that can reach it has. If a row is
    told to end at a length that it has passed already, the rest is cut off.

    Args:
        criteria: called with texts [batch, prompt + length] and None, for length 1, 2, ... in order.
        prompts: [batch, prompt] int64, with their padding.
        pad_token: the token that fills rows whose texts have ended.
        pads: whether a row ends as soon as a criterion says so. If not, as in transformers without EOS, all rows go on until
            each was told to end once.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompts: Tensor, pad_token: int, pads: bool):
        self._criteria, self._prompts, self._pad_token, self._pads = criteria, prompts, pad_token, pads
        self._length = 0  # the number of new tokens for which the criteria were called last
        self._told = [False] * len(prompts)  # whether each row was told to end

    def ask(self, run: Decoding) -> None:
        """Call the criteria for every length that the last step has completed, and end the rows that are to end."""
        while (rows := self._reaching(run, self._length + 1)) and not all(self._told):
            self._length += 1
            flags = self._criteria(self._texts(run), None).tolist()  # type: ignore[arg-type] - its stub wants LongTensor
            self._told = [told or flag for told, flag in zip(self._told, flags, strict=True)]
            for row in rows:
                if self._told[row] if self._pads else all(self._told):
                    run.end(row, self._length)

    def _reaching(self, run: Decoding, length: int) -> list[int]:
        """The rows whose texts reach a length; none as long as a running row is shorter."""
        sizes = list(map(len, run.emitted))
        if any(running and size < length for running, size in zip(run.running, sizes, strict=True)):
            return []
        return [row for row, size in enumerate(sizes) if size >= length]

    def _texts(self, run: Decoding) -> Tensor:
        rows = [text[: self._length] for text in run.emitted]
        new = [row + [self._pad_token] * (self._length - len(row)) for row in rows]
        return torch.cat([self._prompts, torch.tensor(new).to(self._prompts)], 1)
