"""Numbers that say how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from specdec.checks import as_int

# Of a bootstrap.
DRAWS = 500


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, which is one of 95 % unless something else is said.

    Args:
        value: the number.
        low, high: the ends; None where nothing was measured twice, so that nothing is known of its error.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        ends = "?" if self.low is None or self.high is None else f"{self.low:.2f}-{self.high:.2f}"
        return f"{self.value:.2f} ({ends})"

    def above(self, limit: float) -> bool:
        """Whether it is surely above."""
        return self.low is not None and self.low > limit

    def below(self, limit: float) -> bool:
        """Whether it is surely below."""
        return self.high is not None and self.high < limit

    @classmethod
    def of_draws(cls, draws: np.ndarray, samples: int, level: float = 0.95) -> Estimate:
        """From [1 + DRAWS] numbers: the first is of the samples as they are, the others of samples drawn from them again.

        Args:
            samples: how many there were, of what varies most; one says nothing of its error.
            level: of the interval.
        """
        if as_int("samples", samples, 1) == 1:
            return cls(float(draws[0]))
        value, wide = float(draws[0]), _widening(samples, level)
        ends = np.quantile(draws[1:], [(1 - level) / 2, (1 + level) / 2])
        low, high = (value * max(float(end) / value, 0.0) ** wide for end in ends)
        return cls(value, min(low, value), max(high, value))


@cache
def _widening(samples: int, level: float) -> float:
    """How many times as wide an interval must be as that of few samples drawn again: Student's law, of which many are drawn."""
    students = np.random.default_rng(0).standard_t(samples - 1, 100_000)
    normal = NormalDist().inv_cdf((1 + level) / 2)
    return float(np.quantile(abs(students), level)) / normal * (samples / (samples - 1)) ** 0.5


def redrawn(count: int, seed: int) -> np.ndarray:
    """[1 + DRAWS, count] int64: indices of samples, in the first row all of them, in each other row so many drawn again."""
    drawn = np.random.default_rng(seed).integers(count, size=(DRAWS, count))
    return np.concatenate([np.arange(count)[None], drawn])


def medians(samples: np.ndarray, seed: int = 0) -> np.ndarray:
    """[1 + DRAWS]: the median of samples [n], and of samples drawn from them again."""
    return np.median(samples[redrawn(len(samples), seed)], axis=1)
