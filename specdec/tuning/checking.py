"""The best candidates, decoded: round after round beside decoding without a draft, which is compared with itself, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from specdec.generate import Generation
from specdec.trace import Trace
from specdec.tuning.conditions import Conditions
from specdec.tuning.estimate import Estimate, redrawn
from specdec.tuning.foretold import ALONE, Candidate, full_steps


class Check:
    """Tokens and seconds of candidates, of decoding without a draft, and of that once more, by prompt and round.

    Args:
        candidates: what is decoded.
        conditions: of all runs.
    """

    def __init__(self, candidates: Sequence[Candidate], conditions: Conditions):
        self.candidates, self._conditions = list(candidates), conditions
        self._methods = [ALONE, *candidates, ALONE]
        self._engines = [conditions.engine() for _ in self._methods]
        # by prompt, as one that is decoded again is no other: round after round, (tokens, seconds) of each method
        self._spent: dict[tuple[int, ...], list[list[tuple[int, float]]]] = {}
        # how many groups were decoded by all
        self.rounds = 0

    def run(self, groups: Sequence[list[Tensor]], over: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Decode until time is over.

        A group that was not decoded by all does not count, nor do first runs of engines that capture steps.
        """
        if any(engine.static_shapes for engine in self._engines) and not self._decoded(groups[0], 0, over, say):
            return
        while not over():
            turn = self.rounds // len(groups)
            for group in groups:
                if not (found := self._decoded(group, turn, over, say)):
                    return
                for prompt, *row in zip(group, *found, strict=True):
                    if all(tokens for tokens, _ in row):
                        self._spent.setdefault(tuple(prompt.tolist()), []).append(row)
                self.rounds += 1

    def _decoded(
        self, group: Sequence[Tensor], turn: int, over: Callable[[], bool], say: Callable[[str], None]
    ) -> list[list[tuple[int, float]]]:
        """What every method spent, which take turns in being the first; nothing if time is over before the last."""
        found: list[list[tuple[int, float]]] = [[] for _ in self._methods]
        last = None
        for i in np.roll(np.arange(len(self._methods)), turn).tolist():
            say(f"decoding with {self._methods[i].name}")
            found[i], last = self._decode(i, group, turn, over, last)
            if not found[i]:
                return []
        return found

    def _decode(
        self, i: int, group: Sequence[Tensor], turn: int, over: Callable[[], bool], last: Generation | None
    ) -> tuple[list[tuple[int, float]], Generation | None]:
        """What one method spent, nothing if time was over before its end; and its run, if it is kept."""
        method = self._methods[i]
        with self._conditions.in_turn(
            group, last, self._engines[i], method.drafter, rule=method.rule, seed=turn
        ) as run:
            for _ in run:
                if over():
                    return [], None
        return spent(run.generation.trace), self._conditions.kept(run.generation)

    @property
    def prompts(self) -> int:
        """How many prompts were decoded by all."""
        return len(self._spent)

    def speedups(self) -> list[Estimate]:
        """Of every candidate over decoding without a draft: of the time that all prompts take, paired."""
        return [self.over(1 + i, 0) for i in range(len(self.candidates))] if self._spent else []

    @property
    def noise(self) -> Estimate | None:
        """Decoding without a draft over itself."""
        return over_all([times[:, [0, -1]] for times in self._times()]) if self._spent else None

    def over(self, method: int, base: int, level: float = 0.95) -> Estimate:
        """How many times as fast one method is as another; 0 is decoding without a draft, 1 the first candidate."""
        columns = [[0, -1] if of == 0 else [of] for of in (base, method)]
        pairs = [np.stack([times[:, own].mean(1) for own in columns], 1) for times in self._times()]
        return over_all(pairs, level)

    def _times(self) -> list[np.ndarray]:
        """[round, method] of each prompt: seconds of as many tokens as its texts have in the mean."""
        found = [np.array(rounds, float) for rounds in self._spent.values()]
        return [rows[..., 0].mean() * rows[..., 1] / rows[..., 0] for rows in found]


def over_all(pairs: Sequence[Any], level: float = 0.95) -> Estimate:
    """How many times as fast all prompts together are, by the medians over rounds of each.

    Args:
        pairs: for each prompt [round, 2]: its time in two ways. Prompts and rounds are drawn again for the interval.
        level: of the interval.
    """
    drawn = [np.median(np.asarray(own)[redrawn(len(own), seed)], 1) for seed, own in enumerate(pairs)]
    times = np.stack(drawn, 1)  # [1 + DRAWS, prompt, 2]
    again = np.take_along_axis(times, redrawn(len(pairs), len(pairs))[..., None], 1).sum(1)
    return Estimate.of_draws(again[:, 0] / again[:, 1], len(pairs), level)


def spent(trace: Trace) -> list[tuple[int, float]]:
    """(tokens, seconds) of each row: its steps, each as long as those in the mean in which all rows are at work."""
    emitted = np.array([step.emitted for step in trace.steps])
    seconds = np.mean([step.draft_seconds + step.verify_seconds + step.other_seconds for step in full_steps(trace)])
    return [(int(row.sum()), float(seconds * (row > 0).sum())) for row in emitted.T]
