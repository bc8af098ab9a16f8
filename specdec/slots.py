"""Which text is in which row of the batch. A row whose text has ended gets the next one while the others go on."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from specdec import runs
from specdec.batch import common_length
from specdec.models.memory import DoesNotFit
from specdec.request import Request, Text, Written
from specdec.runs import Runs

# While other rows decode, so many tokens of a new prompt are read between two steps: nobody waits for all of a long one.
_CHUNK = 512
# Texts of unequal lengths are decoded in groups, one after another, where that takes less than 1 / _FACTOR of the memory.
# Rows of up to _SHORT tokens take little in any case.
_FACTOR, _SHORT = 2, 1024


class Slots:
    """The rows of a run, filled with the texts of a request.

    Attributes:
        runs: what the run owns: another one after a move to a smaller batch, or to the next group of texts.
        held: for each row the index of the text in it, which may have ended; -1 while a prompt is being read.
        written: what has been written of each text that has taken a step, now or in an earlier call. An interrupt may come at
            any time: every entry is replaced as a whole, after all that ends texts has been asked; only its notes may be one
            step ahead.
        ended: indices of the texts that have ended in the last step.
    """

    def __init__(self, request: Request):
        self._request, self._groups = request, deque(groups(request.texts, request.slots))
        self._moves = True  # whether a smaller batch has found room beside a larger one so far
        self._cut_at: dict[int, int] = {}  # most new tokens of the texts that were ended by `end`
        self.written = dict(request.written)
        self._begin()

    def _begin(self) -> None:
        """Begin to decode the next group of texts."""
        group = self._groups.popleft()
        rows = self._request.slots or len(group)
        self._texts, self._waiting = group[:rows], deque(group[rows:])
        self._partial: dict[int, Text] = {}  # texts whose prompts are being read, by row
        self._largest: Runs | None = None
        self.runs = self._largest = runs.start(self._request, self._texts, max(text.longest for text in group))
        self.held, self.ended = [text.index for text in self._texts], []
        self.runs.batch.waiting = bool(self._waiting)

    def close(self) -> None:
        """Hand back what the run owns; it cannot go on after that."""
        self.held = []
        if self._largest is not None:
            runs.end(self._request, self._largest)
            self._largest = None

    @property
    def finished(self) -> bool:
        """Whether every text has ended."""
        return not (any(self.runs.batch.host_left) or self._waiting or self._partial or self._groups)

    def fill(self) -> None:
        """Before a step: give free rows to waiting texts; if none waits, move to a smaller batch or to the next group."""
        if self._request.slots is None:
            return
        going = [row for row, left in enumerate(self.runs.batch.host_left) if left]
        if self._waiting or self._partial:
            self._enter(going)
        elif not going:
            self.close()
            self._begin()
        elif 2 * len(going) <= len(self.held) and self._moves:
            self._move(going)

    def _enter(self, going: Sequence[int]) -> None:
        texts: dict[int, tuple[Text, int]] = {}
        for row in range(len(self.held)):
            if row in going or not (row in self._partial or self._waiting):
                continue
            text = self._partial.pop(row, None) or self._waiting.popleft()
            count = self._readable(text) if going else len(text.tokens)
            # A row holds its text once that is there: until then, an interrupt finds nothing of it.
            self.held[row], self._texts[row], texts[row] = -1, text, (text, count)
            if count < len(text.tokens):
                self._partial[row] = text
        if texts:
            self.runs.batch.waiting = bool(self._waiting)
            runs.enter(self._request, self.runs, texts)
            for row, (text, _) in texts.items():
                self.held[row] = -1 if row in self._partial else text.index

    def _readable(self, text: Text) -> int:
        """How much of a text can be begun now: what can be copied from some row, and a chunk more."""
        parts, shared = (self.runs.target, self.runs.drafter), 0
        for row, other in enumerate(self.runs.batch.texts):
            common = common_length(other, text.tokens)
            shared = max(shared, min(part.reaches(row, common) for part in parts))
        return min(shared + _CHUNK, len(text.tokens))

    def _move(self, going: Sequence[int]) -> None:
        """Move to half as many rows, or half of that again; rows that stay free keep their ended texts."""
        rows = len(self.held)
        while rows // 2 >= len(going):
            rows //= 2
        batch, steps = self.runs.batch, self.runs.coins.steps
        stay = [*going, *(row for row in range(len(self.held)) if row not in going)][:rows]
        texts = [
            replace(
                self._texts[row],
                tokens=batch.text(row),
                left=batch.host_left[row],
                step=steps[row],
                processors=batch.processors[row],
            )
            for row in stay
        ]
        held = [self.held[row] for row in stay]
        try:
            smaller = runs.moved(self._request, self.runs, texts)
        except (DoesNotFit, torch.OutOfMemoryError) as error:
            self._moves = False
            warnings.warn(f"The last texts are decoded in a batch of {len(self.held)}: {error}", stacklevel=2)
            return
        self.held, self._texts, self.runs = held, texts, smaller
        if not self._request.engine.static_shapes:
            self._largest = self.runs  # nobody will ask for the larger one, whose memory is needed elsewhere

    def note_step(self, notes: Sequence[Tensor]) -> None:
        """After a step: note what has been written, and what has ended. `notes`: what the step noted, by row; may be empty."""
        self.ended = []
        for row, index in enumerate(self.held):
            if index < 0:
                continue
            before, tokens, over = self.written.get(index), self._tokens(row), not self.runs.batch.host_left[row]
            if before and before.ended and len(before.tokens) == len(tokens):
                continue
            noted = before.notes if before else []
            noted += notes[row : row + 1]
            if over:  # what stays behind does not keep the row's whole buffer, or a tensor for each step
                tokens, noted = tokens.copy(), [torch.cat(noted)] if noted else []
            self.written[index] = Written(tokens, self.runs.coins.steps[row], over, noted)
            if over and not (before and before.ended):
                self.ended.append(index)

    def tokens(self, index: int) -> np.ndarray:
        """[n] int64: the new tokens of a text so far, those of this step included."""
        if index in self.held:
            return self._tokens(self.held.index(index))
        return self.written[index].tokens if index in self.written else np.empty(0, np.int64)

    def ending_texts(self) -> Iterator[list[int]]:
        """The whole texts, prompts included, that end in this step."""
        for row, index in enumerate(self.held):
            before = self.written.get(index)
            if index >= 0 and not self.runs.batch.host_left[row] and not (before and before.ended):
                text = self._texts[row]
                yield [*text.tokens[: text.prompt].tolist(), *self._tokens(row).tolist()]

    def _tokens(self, row: int) -> np.ndarray:
        return self.runs.batch.text(row)[self._texts[row].prompt :][: self._cut_at.get(self.held[row])]

    def end(self, index: int, kept: int) -> None:
        """End a text, which a row must hold, after the first `kept` >= 1 of its new tokens."""
        self._cut_at[index] = kept
        self.runs.batch.end(self.held.index(index))


def groups(texts: Sequence[Text], slots: int | None) -> list[list[Text]]:
    """The texts in groups that are decoded one after another, each in rows as long as its longest text.

    A few long texts must not size the rows of all others. The group that takes most memory comes first, so that what does not
    fit is refused at once, and in a group the texts that may get most tokens, as the last ones are decoded in few rows.
    """
    if slots is None:
        return [list(texts)]
    waiting, found = sorted(texts, key=lambda text: -text.longest), []
    while waiting:
        end = _group_end([max(text.longest, _SHORT) for text in waiting], slots)
        found.append(sorted(waiting[:end], key=lambda text: (-text.left, text.index)))
        waiting = waiting[end:]
    return sorted(found, key=lambda group: -_memory([text.longest for text in group], slots))


def _group_end(lengths: Sequence[int], slots: int) -> int:
    """How many of these lengths, the longest first, to decode together."""

    for end in range(1, len(lengths)):
        if lengths[end] * _FACTOR <= lengths[0] and lengths[end] < lengths[end - 1]:
            apart = max(_memory(lengths[:end], slots), _memory(lengths[end:], slots))
            if apart * _FACTOR <= _memory(lengths, slots):
                return end
    return len(lengths)


def _memory(lengths: Sequence[int], slots: int) -> int:
    """What rows for texts of these lengths take, in tokens."""
    return min(slots, len(lengths)) * max(lengths)
