"""Coins that follow every outcome, in rational arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.coins import Coins, Purpose, RowCoins


class Script:
    """One way through all choices of a run. It replays the given choices, and notes the other ones.

    A coin is a uniform number in an interval, which narrows with every question that the coin answers. So a coin that is used
    twice gives answers that agree.

    Attributes:
        probability: that the coins lead this way.
        branches: the choices that lead other ways, from the first place on that was not given.
    """

    def __init__(self, choices: Sequence[int] = ()):
        self.probability, self.branches = Fraction(1), list[list[int]]()
        self._choices, self._place = list(choices), 0
        self._intervals: dict[tuple, tuple[Fraction, Fraction]] = {}

    def flip(self, key: tuple, weights: Sequence[Fraction], decides: bool = True) -> int:
        """The outcome of the coin of this key, by inverse CDF of `weights` in index order.

        A coin that decides nothing has the first outcome, and is not followed.
        """
        low, high = self._intervals.get(key, (Fraction(0), Fraction(1)))
        outcomes, edge, total = [], Fraction(0), sum(weights)
        for index, weight in enumerate(weights):
            if weight == 0:
                continue
            start, edge = edge, edge + (weight if total == 1 else weight / total)
            if start < high and low < edge:
                outcomes.append((index, max(start, low), min(edge, high)))
        if not decides:
            return outcomes[0][0]
        choice = self._choice(len(outcomes))
        if choice >= len(outcomes):
            raise AssertionError("The same coins led to other choices: draw with `coins` only, nothing else is random.")
        index, start, edge = outcomes[choice]
        self._intervals[key] = (start, edge)
        self.probability *= (edge - start) / (high - low)
        return index

    def _choice(self, count: int) -> int:
        if count == 1:
            return 0
        if self._place == len(self._choices):
            self.branches += [[*self._choices, other] for other in range(1, count)]
            self._choices.append(0)
        self._place += 1
        return self._choices[self._place - 1]


class ExactCoins(Coins):
    """Coins that follow every outcome: each row of the batch replays a script.

    Args:
        scripts: one for each row; the same one for rows of one run.
        nodes: size of the largest tree, the root included.

    Attributes:
        ended: rows whose texts have ended: their coins decide nothing.
    """

    enumerates = True

    def __init__(self, scripts: Sequence[Script], nodes: int):
        self.scripts, self.ended = list(scripts), [False] * len(scripts)
        super().__init__(0, len(scripts), nodes)

    def _tabulate(self) -> None:
        """Nothing is tabulated: every outcome is followed, whatever the seed."""

    def enter(self, rows: Sequence[int], keys: Sequence[int], steps: Sequence[int]) -> None:
        super().enter(rows, keys, steps)
        self.ended = [ended and row not in rows for row, ended in enumerate(self.ended)]

    def advance(self) -> None:
        self.steps = [step + 1 for step in self.steps]

    def flip(self, row: int, purpose: Purpose, node: int, weights: Sequence[Fraction]) -> int:
        """The outcome of one coin, by inverse CDF of `weights` in index order."""
        key = (self.keys[row], self.steps[row], purpose, node)
        return self.scripts[row].flip(key, weights, not self.ended[row])

    def picks(self, nodes: range, weights: Tensor) -> Tensor:
        rows = weights.double().numpy(force=True)
        drawn = [
            [
                self.flip(b, Purpose.DRAFT, node, w) if any(w := fractions(rows[b, j])) else 0
                for j, node in enumerate(nodes)
            ]
            for b in range(self.batch)
        ]
        return torch.tensor(drawn, device=weights.device).view(weights.shape[:2])

    def row(self, row: int) -> RowCoins:
        return _ExactRow(self, row)


class _ExactRow(RowCoins):
    _coins: ExactCoins

    def accept(self, node: int, probability: Any) -> bool:
        p = min(Fraction(probability), Fraction(1))
        return self._coins.flip(self._row, Purpose.ACCEPT, node, [p, 1 - p]) == 0

    def pick(self, node: int, probabilities: Any, purpose: Purpose = Purpose.EMIT) -> int:
        return self._coins.flip(self._row, purpose, node, list(probabilities))

    def normalise(self, weights: np.ndarray) -> np.ndarray:
        return np.array(_exact(np.asarray(weights, dtype=np.float64).tobytes()), dtype=object)


def fractions(weights: np.ndarray) -> list[Fraction]:
    return [Fraction(float(w)) for w in weights]


@lru_cache(maxsize=2**14)
def _exact(weights: bytes) -> tuple[Fraction, ...]:
    """The exact law of float64 weights. Cached, because all rows of a batch ask for the laws after the same few texts."""
    exact = fractions(np.frombuffer(weights))
    total = sum(exact)
    return tuple(weight / total for weight in exact)
