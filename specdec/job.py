"""A job: a request whose texts are written to a journal as they end, and whose progress is shown."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike

import numpy as np
import torch

from specdec.checks import check_kind
from specdec.journal import Journal, Kept, settings_of
from specdec.loop import Decoding
from specdec.progress import Progress
from specdec.request import Request, Text, Written
from specdec.trace.trace import Trace


class Job:
    """A request at work.

    Args:
        request: what is asked for.
        journal: a file that keeps every finished text and, on an interrupt, the texts in hand; the same request goes on from
            it. None: no file.
        progress: whether to show a bar.

    Raises:
        ValueError: the journal is of another job, or somebody writes to it.
    """

    def __init__(self, request: Request, journal: str | PathLike[str] | None, progress: bool):
        check_kind("progress", progress, bool, "pass True or False")
        if journal is not None:
            check_kind("journal", journal, (str, PathLike), "pass the path of a file, or None")
        self.request, self._path, self._shown = request, journal, progress
        self._journal: Journal | None = None
        self._run: Decoding | None = None
        self.trace, self.runs = Trace(), None

    def steps(self) -> Generator[list[tuple[int, np.ndarray]]]:
        """What each step adds: (index, new tokens) of texts, first of all those that earlier calls have written."""
        with ExitStack() as stack:
            if self._path is not None:
                self._journal = stack.enter_context(_opened(self._path, self.request))
                self.request = remaining(self.request, self._journal)
            if self.request.written:
                yield [(index, text.tokens) for index, text in self.request.written.items()]
            if self.request.texts:
                yield from self._decoded(stack)

    def _decoded(self, stack: ExitStack) -> Iterator[list[tuple[int, np.ndarray]]]:
        request, ended = self.request, sum(text.ended for text in self.request.written.values())
        rows = min(request.slots or len(request.texts), len(request.texts))
        bar = stack.enter_context(Progress(request.count - len(request.skipped), rows, self._shown, ended))
        run = self._run = stack.enter_context(Decoding(request))
        self.trace, self.runs = run.trace, run.runs if request.keep else None
        try:
            for _ in run.steps():
                self._keep(run.slots.ended)
                counts = run.trace.steps[-1].emitted
                bar.step(len(run.slots.ended), sum(map(bool, counts)), sum(counts))
                news = zip(run.held, counts, strict=True)
                yield [(index, self.written[index].tokens[-count:]) for index, count in news if count]
        except BaseException:
            self._keep(run.slots.written)
            raise

    def _keep(self, indices: Sequence[int] | Mapping[int, Written]) -> None:
        """Write texts to the journal, finished or in hand."""
        if self._journal is None:
            return
        for index in indices:
            text = self.written[index]
            noted = text.noted.T.tolist() if self.request.notes else []
            columns = {note.__name__: column for note, column in zip(self.request.notes, noted, strict=True)}
            if text.ended:
                self._journal.end(index, text.tokens, **columns)
            else:
                self._journal.pause(index, text.tokens, text.steps, **columns)

    @property
    def written(self) -> Mapping[int, Written]:
        """What has been written of each text so far, those of earlier calls included."""
        return self.request.written if self._run is None else self._run.slots.written


def _opened(path: str | PathLike[str], request: Request) -> Journal:
    """The journal, in which every prompt that cannot be decoded is noted."""
    if (processes := getattr(request.target.model, "tp_size", None) or 1) > 1:
        raise ValueError(
            f"journal={path}: {processes} processes that share this model would all write to it; leave it out."
        )
    journal = Journal(path, settings_of(request))
    for index, reason in request.skipped.items():
        if index not in journal.skipped:
            journal.skip(index, reason)
    return journal


def remaining(request: Request, journal: Journal) -> Request:
    """What remains to be written of a request: not the texts that the journal has, and of those in hand the rest.

    Logits processors that keep state follow a text from its prompt on, so a text in hand that has some begins anew, with the
    same coins.
    """
    names = [note.__name__ for note in request.notes]
    finished = {index: _written(kept, names, ended=True) for index, kept in journal.finished.items()}
    processed = {text.index for text in request.texts if text.processors.keep_state}
    in_hand = {
        index: _written(kept, names, ended=False) for index, kept in journal.in_hand.items() if index not in processed
    }
    rest = [text for text in request.texts if text.index not in finished]
    texts = [_grown(text, in_hand[text.index]) if text.index in in_hand else text for text in rest]
    return replace(request, texts=texts, written={**finished, **in_hand})


def _written(kept: Kept, names: Sequence[str], ended: bool) -> Written:
    """A text of the journal. `names`: of the columns that the request notes."""
    columns = [torch.from_numpy(kept.columns[name]).float() for name in names]
    return Written(kept.tokens, kept.step or 0, ended, [torch.stack(columns, 1)] if columns else [])


def _grown(text: Text, written: Written) -> Text:
    """The text with what has been written of it."""
    tokens = np.concatenate([text.tokens, written.tokens])
    return replace(text, tokens=tokens, left=text.left - len(written.tokens), step=written.steps)
