"""Estimates that follow what is seen: acceptance, times by size, and what accepted drafts are worth to a batch.

Host numbers only, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

_PRIOR = 2.0  # successes: one or two failures at the start of a run say little
_FORGET = 0.005  # of what was seen, every step
_KEEP = 0.99  # of the weight of a time, every newer one
_OUTLIER = 2.0  # a time counts as at most so many times what was known: other processes interrupt
_TRUST = 10.0  # times: how often a size must have been timed to be believed as much as the line through all of them
_SLOPE = 0.05  # of one more node, relative to a single one, before larger trees have been timed
_DOUBT = 5.0  # how much timing outweighs that: the sum of (nodes - 1) squared
_UNLIKE = 0.2  # standard deviation of texts' acceptance, relative to its mean: 0.3 greedy, 0.15 sampled (demo pair)


@dataclass
class Rate:
    """Successes / trials, begun with _PRIOR successes, and slowly forgotten.

    So what never succeeds is still tried from time to time, and what that costs is bounded. A trial that pays with a
    chance of x is made while _PRIOR / (_PRIOR + E) >= x, after E trials in vain: these lose x E < _PRIOR tokens, and as
    _FORGET * E trials are forgotten per step, so many are made again, and lose at most _PRIOR * _FORGET tokens per step.
    """

    trials: float = 0.0
    successes: float = 0.0

    def __call__(self) -> float:
        return (_PRIOR + self.successes) / (_PRIOR + self.trials)

    def see(self, successes: float, trials: float) -> None:
        self.successes += successes
        self.trials += trials

    def forget(self, steps: int) -> None:
        """A little of what was seen, with every step."""
        self._shrink((1 - _FORGET) ** steps)

    def keep(self, trials: float) -> None:
        """Forget all but so many trials."""
        self._shrink(trials / max(self.trials, trials))

    def _shrink(self, left: float) -> None:
        self.successes *= left
        self.trials *= left


class Times:
    """Seconds by size 1, 2, ...: what was timed lately, and a straight line through all of it where that is little.

    Args:
        sizes: how many.
        given: times that are believed whatever is seen.
    """

    def __init__(self, sizes: int, given: Callable[[int], float] | None = None):
        self.sizes, self._given = sizes, given and [given(size) for size in range(1, sizes + 1)]
        # [size - 1]: how often, and seconds together; old ones count less
        self._counts, self._sums = [0.0] * sizes, [0.0] * sizes
        self._moments = [0.0] * 5  # sums of 1, seconds, x, x^2, x seconds, where x = size - 1
        self._known = self._given or [0.0] * sizes  # [size - 1]: what is believed

    def __call__(self, size: int) -> float:
        """Seconds; 0 as long as nothing is known."""
        return self._known[size - 1]

    def see(self, size: int, seconds: float) -> None:
        if self._given:
            return
        x, known = size - 1, self(size)
        seconds = min(seconds, _OUTLIER * known) if known else seconds
        self._counts, self._sums = [_KEEP * n for n in self._counts], [_KEEP * total for total in self._sums]
        self._counts[x] += 1
        self._sums[x] += seconds
        new = (1, seconds, x, x * x, x * seconds)
        self._moments = [_KEEP * old + more for old, more in zip(self._moments, new, strict=True)]
        first, slope = self._line()
        self._known = [
            (total + _TRUST * (first + slope * x)) / (count + _TRUST)
            for x, (count, total) in enumerate(zip(self._counts, self._sums, strict=True))
        ]

    def timed(self, size: int) -> float:
        """How often, of late."""
        return math.inf if self._given else self._counts[size - 1]

    def _line(self) -> tuple[float, float]:
        """(first, slope): least squares of seconds = first + slope x, begun as if a slope of _SLOPE had been seen."""
        count, seconds, distance, square, product = self._moments
        # slope = _SLOPE first, as so much evidence that x^2 sums to _DOUBT
        a, b, c = count + _DOUBT * _SLOPE**2, distance - _DOUBT * _SLOPE, square + _DOUBT
        slope = (a * product - b * seconds) / (a * c - b * b)
        first = (c * seconds - b * product) / (a * c - b * b)
        return (first, slope) if slope > 0 else (seconds / count, 0.0)


class Lag(NamedTuple):
    """How far the last row will be behind.

    Args:
        last: standard deviations.
        left: tokens still to come.
    """

    last: float
    left: float

    @classmethod
    def of(cls, rows: float, left: float) -> Lag:
        """The least of so many normal variables (Blom 1958)."""
        return cls(NormalDist().inv_cdf((rows - 0.375) / (rows + 0.25)), left)


class Accepted(NamedTuple):
    """How many drafted tokens a row is going to accept in a step: the mean, and the mean square."""

    mean: float = 0.0
    square: float = 0.0

    def and_at(self, level: int, chance: float) -> Accepted:
        """And, with that chance, one more after `level` of them."""
        return Accepted(self.mean + chance, self.square + (2 * level + 1) * chance)

    def worth(self, lag: Lag) -> float:
        """Tokens by which they bring the end of the run nearer.

        A run ends with its last row, and a draft brings some rows further than others, by chance and because some texts are
        drafted better: the last is behind the mean by as many standard deviations as the least of so many normal variables.
        """
        steps = lag.left / (1 + self.mean)
        chance = max(self.square - self.mean**2, 0.0) / steps
        return self.mean - lag.last * math.sqrt(chance + (_UNLIKE * self.mean) ** 2)
