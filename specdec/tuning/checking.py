"""The best candidates, decoded: round after round beside decoding without a draft, which is compared with itself, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from specdec.trace import Trace
from specdec.tuning.conditions import Conditions
from specdec.tuning.estimate import DRAWS, Estimate
from specdec.tuning.foretold import ALONE, Candidate


class Check:
    """Speeds of candidates, of decoding without a draft, and of that once more, by round and group of prompts.

    Args:
        candidates: what is decoded.
        conditions: of all runs.
    """

    def __init__(self, candidates: Sequence[Candidate], conditions: Conditions):
        self.candidates, self._conditions = list(candidates), conditions
        self._methods = [ALONE, *candidates, ALONE]
        self._engines = [conditions.engine() for _ in self._methods]
        self._speeds: dict[tuple[int, int], list[float]] = {}  # by round and group: of each method

    def run(self, groups: Sequence[list[Tensor]], over: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Decode until time is over.

        A group that was not decoded by all does not count, nor do first runs of engines that capture steps.
        """
        if any(engine.captures for engine in self._engines) and not self._row(groups[0], 0, over, say):
            return
        turn = 0
        while not over():
            for number, group in enumerate(groups):
                if not (row := self._row(group, turn, over, say)):
                    return
                self._speeds[turn, number] = row
            turn += 1

    def _row(
        self, group: Sequence[Tensor], turn: int, over: Callable[[], bool], say: Callable[[str], None]
    ) -> list[float]:
        """The speed of every method, which take turns in being the first; nothing if time is over before the last."""
        speeds = [0.0] * len(self._methods)
        order = np.roll(np.arange(len(self._methods)), turn)
        for i in order:
            method, engine = self._methods[i], self._engines[i]
            say(f"decoding with {method.name}")
            with self._conditions.stream(group, method.drafter, rule=method.rule, engine=engine, seed=turn) as run:
                for _ in run:
                    if over():
                        return []
                speeds[i] = speed(run.generation.trace)
        return speeds

    @property
    def rounds(self) -> int:
        """How many groups were decoded by all."""
        return len(self._speeds)

    def speedups(self) -> list[Estimate]:
        """Of every candidate over decoding without a draft: of the time that all groups take, paired."""
        return [self.over(1 + i, 0) for i in range(len(self.candidates))] if self._speeds else []

    @property
    def noise(self) -> Estimate | None:
        """Decoding without a draft over itself."""
        last = len(self._methods) - 1
        return (
            over_all([[(1 / row[0], 1 / row[last]) for row in own] for own in self._rows()]) if self._speeds else None
        )

    def over(self, method: int, base: int, level: float = 0.95) -> Estimate:
        """How many times as fast one method is as another; 0 is decoding without a draft, 1 the first candidate."""

        def seconds(row: list[float], of: int) -> float:
            return 2 / (row[0] + row[-1]) if of == 0 else 1 / row[of]

        pairs = [[(seconds(row, base), seconds(row, method)) for row in own] for own in self._rows()]
        return over_all(pairs, level)

    def _rows(self) -> list[list[list[float]]]:
        """The speeds of each group, round after round."""
        rows: dict[int, list[list[float]]] = {}  # by group: a prompt that is decoded again is no other prompt
        for (_, group), row in self._speeds.items():
            rows.setdefault(group, []).append(row)
        return [*rows.values()]


def over_all(pairs: list[list[tuple[float, float]]], level: float = 0.95) -> Estimate:
    """How many times as fast all groups together are, by the medians over rounds of each.

    Args:
        pairs: for each group, and round of it, the time of a token in two ways. Both are drawn again for the interval.
        level: of the interval.
    """
    random, groups = np.random.default_rng(0), [np.array(own) for own in pairs]
    draws = [_ratio([np.median(own, 0) for own in groups])]
    for _ in range(DRAWS):
        drawn = [groups[i] for i in random.integers(len(groups), size=len(groups))]
        draws.append(_ratio([np.median(own[random.integers(len(own), size=len(own))], 0) for own in drawn]))
    return Estimate.of_draws(np.array(draws), sum(map(len, pairs)), level)


def _ratio(times: list[np.ndarray]) -> float:
    first, second = np.sum(times, 0)
    return float(first / second)


def speed(trace: Trace) -> float:
    """Tokens of a row per second, while all rows are at work: tokens per step of a row over the mean time of full steps."""
    steps = [step for step in trace.steps if any(step.emitted)]
    given = [n for step in steps for n in step.emitted if n]
    full = [step for step in steps if all(step.emitted)] or steps
    seconds = np.mean([step.draft_seconds + step.verify_seconds + step.other_seconds for step in full])
    return float(np.mean(given) / seconds) if given and seconds else 0.0
