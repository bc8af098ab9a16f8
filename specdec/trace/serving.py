"""How long each text waited and took: what matters to whoever asked for it, and not to the batch as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from specdec.trace.trace import Step, Trace


@dataclass
class Life:
    """One text in a trace. Times are seconds from the call.

    Args:
        began: when it got its row: at the call, or at the beginning of the step that entered it.
        first: end of the step that gave its first tokens; None if it got none.
        last: end of the step that gave its last ones.
        tokens: how many it got.
        later: how many of them came after the step of the first ones.
    """

    began: float
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    later: int = 0

    def add(self, tokens: int, end: float) -> None:
        """Note the tokens of a step that ended then."""
        if self.first is None:
            self.first = end
        else:
            self.later += tokens
        self.tokens, self.last = self.tokens + tokens, end


def timed(trace: Trace) -> Iterator[tuple[Step, float, float]]:
    """Every step with its beginning and its end, in seconds from the call; the first one begins with the call."""
    start, end = 0.0, trace.prefill_seconds
    for step in trace.steps:
        end += step.seconds
        yield step, start, end
        start = end


def lives(trace: Trace) -> dict[int, Life]:
    """The life of every text of one run, by its index, in the order in which they entered."""
    found: dict[int, Life] = {}
    reading: dict[int, float] = {}  # when the prompt that is being read in a row was begun
    for step, start, end in timed(trace):
        for row, (text, tokens) in enumerate(zip(step.held, step.emitted, strict=True)):
            if text < 0:
                reading.setdefault(row, start)
                continue
            began = reading.pop(row, start)
            life = found.setdefault(text, Life(began))
            if tokens:
                life.add(tokens, end)
    return found


def serving(trace: Trace) -> dict[str, float | dict[str, float | None]]:
    """The metrics of serving; `Trace.summary` defines them."""
    started = [(life, life.first) for life in lives(trace).values() if life.first is not None]
    shares = [sum(n > 0 for n in step.emitted) / len(step.emitted) for step in trace.steps]
    return {
        "rows_running": float(np.mean(shares)) if shares else 0.0,
        "ttft_seconds": _spread([first - life.began for life, first in started]),
        "tpot_seconds": _spread([(life.last - first) / life.later for life, first in started if life.later]),
        "longest_gap_seconds": max((step.seconds for step in trace.steps[1:]), default=0.0),
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"median": None, "p95": None}
    return {"median": float(np.median(values)), "p95": float(np.percentile(values, 95))}
