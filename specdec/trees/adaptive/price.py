"""What drafting costs and brings, learned from run to run: host numbers only, no tensors. `Adaptive` decides by it.

Tokens, reach and outcomes are averages over the rows, weighted by how much the end of the run depends on each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from specdec.trees.adaptive.hit_rates import Accepted, Lag, Rate, Times

_CARRIED = 8.0  # trials: what earlier texts say of the next
_CLEAR = 1.15  # times as fast as without a draft: where drafts pay less, steps without one are timed
_OFTEN, _SELDOM = 5.0, 1.5  # times: so often of late, and where drafts clearly pay: about every fiftieth step
_SPEED = 0.1  # weight of the newest step in the speed


class Economy:
    """What is known, and the state of a step.

    A step asks `continues` before each level, says how many `children` its nodes and how many nodes its `frontier` has,
    and then what became of it (`learn`).

    Args:
        verify: of the target's passes, by nodes of the tree, and of all else in a step that is not the draft's.
        first: of the draft's first pass, which may read more, and in which Medusa heads do all their work.
        draft: of its other passes, by nodes of the frontier.
    """

    def __init__(self, verify: Times, first: Times, draft: Times):
        self._verify, self._first, self._draft = verify, first, draft
        self._accepted, self._confidence = Rate(), Rate()
        self._proven, self._tokens, self._seconds = 0.0, 0.0, 0.0

    def turn_to_another_text(self) -> None:
        """What drafts came to in the texts before counts as so many trials at most."""
        for rate in (self._accepted, self._confidence):
            rate.keep(_CARRIED)

    def begin(self, limit: int, rows: float = 1.0, left: float = math.inf, steps: int = 1) -> None:
        """A step that may draft `limit` levels. The first draft nothing, and some others, to know what that takes.

        Args:
            rows: how many may be the last to end.
            left: tokens that they have to go.
            steps: since the last one that began.
        """
        self._lag, self._steps = Lag.of(rows, left), steps
        known = self._verify(1) > 0
        speed = self._tokens / self._seconds if self._seconds else 0.0
        self._speed = max(speed, 1 / self._verify(1)) if known else 0.0  # tokens per second
        clear = not self._first(1) or self._speed * self._verify(1) > _CLEAR
        self.sure = self._verify.timed(1) >= (_SELDOM if clear else _OFTEN)
        self._limit = min(limit, int(2 * (1 + self._proven))) if self.sure else 0  # twice what was accepted lately
        self._level, self._nodes, self._width, self._reach = 0, 1, 1, 1.0
        self._drafting = self._drafted = 0.0
        self._drafts = Accepted()
        self._start = self._mark = time.perf_counter()

    @property
    def calibration(self) -> float:
        """Acceptance relative to what the draft's confidence says."""
        return self._accepted()

    @property
    def room(self) -> int:
        """How many children each node of the frontier may still have."""
        return (self._verify.sizes - self._nodes) // self._width

    def continues(self) -> bool:
        """Whether to ask the draft for one more level."""
        going = self._level < self._limit and self._ahead(self._reach, self._nodes, self._level, self._drafts) > 0
        self._mark = time.perf_counter()
        return going

    def children(self, reach: float, families: Sequence[float]) -> int:
        """How many children each node of the frontier is to have, maybe 0.

        Args:
            reach: chances of the frontier's nodes to be accepted, summed over the nodes.
            families: the same for children 1, 1 and 2, ... of theirs, by the draft's confidence.
        """
        elapsed = time.perf_counter() - self._mark
        (self._draft if self._level else self._first).see(self._width, elapsed)
        self._drafted += elapsed
        self._drafting += self._pass(self._level)
        if reach > 0:
            self._confidence.see(families[0] / reach, 1)

        gains = [0.0, *(min(self.calibration * family, reach) for family in families)]

        def worth(count: int) -> float:
            gain, nodes = gains[count], self._nodes + self._width * count
            drafts = self._drafts.and_at(self._level, gain)
            ahead = max(self._ahead(gain, nodes, self._level + 1, drafts), 0)
            return drafts.worth(self._lag) - self._drafts.worth(self._lag) + ahead - self._price(self._nodes, nodes)

        values = [0.0, *map(worth, range(1, len(families) + 1))]
        count = max(range(len(values)), key=values.__getitem__)
        if count:
            self._drafts = self._drafts.and_at(self._level, gains[count])
            self._nodes += self._width * count
            self._level += 1
        return count

    def frontier(self, reach: Sequence[float]) -> int:
        """How many of the newest nodes to continue.

        Args:
            reach: of the most promising, second most promising ... of them of each row.
        """
        self._width, each = 1, self.calibration * self._confidence()
        for count, chance in enumerate(reach[1:], 2):
            if self._nodes + count > self._verify.sizes:
                break
            drafting = self._speed * (self._draft(count) - self._draft(count - 1))
            if chance * each <= drafting + self._price(self._nodes + count - 1, self._nodes + count):
                break
            self._width = count
        self._reach = sum(reach[: self._width])
        return self._width

    def finish(self) -> None:
        """The tree is grown."""
        seconds = self._drafting + self._verify(self._nodes)
        if seconds:
            self._tokens += _SPEED * (1 + self._drafts.worth(self._lag) - self._tokens)
            self._seconds += _SPEED * (seconds - self._seconds)

    def learn(self, paths: Sequence[tuple[float, Sequence[float]]]) -> None:
        """What became of the step.

        Args:
            paths: of rows that go on, (weight, what confidence expected of the children of each accepted node): 0 where
                there were none, and nothing at all where another drafter drafted.
        """
        self._verify.see(self._nodes, time.perf_counter() - self._start - self._drafted)
        for rate in (self._accepted, self._confidence):
            rate.forget(self._steps)
        for weight, path in paths:
            if path:
                self._accepted.see(weight * (len(path) - 1), weight * sum(path))
        self._proven = max(0.9 * self._proven, sum(weight * (len(path) - 1) for weight, path in paths if path))

    def _price(self, before: int, after: int) -> float:
        """Of verifying `after` nodes instead of `before`, in tokens."""
        return self._speed * (self._verify(after) - self._verify(before))

    def _ahead(self, reach: float, nodes: int, level: int, drafts: Accepted) -> float:
        """What the best number of further levels is worth in tokens, at average confidence and one child a node."""
        best, seconds, sofar, start = 0.0, 0.0, drafts.worth(self._lag), nodes
        each, price = min(self.calibration * self._confidence(), 1), self._speed * self._draft(self._width)
        end = min(self._limit, level + (self._verify.sizes - nodes) // self._width)
        for further in range(level, end):
            reach *= each
            if further and reach <= price:
                break  # nor does a later level pay, which reaches less
            nodes += self._width
            drafts = drafts.and_at(further, reach)
            seconds += self._pass(further)
            worth = drafts.worth(self._lag) - sofar - self._speed * seconds - self._price(start, nodes)
            best = max(best, worth)
        return best

    def _pass(self, level: int) -> float:
        """Seconds of the draft's pass for this level."""
        return self._draft(self._width) if level else self._first(1)
