"""The progress of a long job, as a bar in a terminal or a notebook."""

from __future__ import annotations

import time

_SECONDS = 0.25  # between two drawings, at least


class Progress:
    """A bar of the texts that have ended, with tokens per second, rows running and acceptance length.

    >>> with Progress(texts=64, rows=8, shown=True) as progress:
    ...     progress.step(ended=1, running=8, tokens=19)

    It is drawn at most four times a second, in a notebook as a widget, and stays with its last figures however the job ends.

    Args:
        texts: how many there are to be written.
        rows: of a batch.
        shown: whether there is a bar at all; if not, nothing is done.
        ended: how many of the texts were finished before, as a journal has them.
    """

    def __init__(self, texts: int, rows: int, shown: bool, ended: int = 0):
        from tqdm.auto import tqdm  # here, as few need it

        self._rows, self._running, self._tokens, self._row_steps = rows, 0, 0, 0
        self._began = time.perf_counter()
        # miniters=0: drawn by time alone, so also when no text ends for long
        self._bar = tqdm(
            total=texts,
            initial=ended,
            unit="text",
            mininterval=_SECONDS,
            miniters=0,
            disable=not shown,
            dynamic_ncols=True,
        )

    def step(self, ended: int, running: int, tokens: int) -> None:
        """Note a step.

        Args:
            ended: how many texts ended in it.
            running: rows that were at work on a text in it.
            tokens: how many they got, all together.
        """
        self._tokens, self._row_steps, self._running = self._tokens + tokens, self._row_steps + running, running
        self._bar.set_postfix_str(self._figures(), refresh=False)
        self._bar.update(ended)

    def _figures(self) -> str:
        speed = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        length = self._tokens / max(self._row_steps, 1)
        return f"{speed:.0f} tokens/s, {self._running} of {self._rows} rows, acceptance length {length:.2f}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
