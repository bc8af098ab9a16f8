"""Drafts that are there to be timed: of several sizes, one after the other in one run, so that drift hits all alike."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.batch import Batch
from specdec.checks import as_ints
from specdec.coins import Coins
from specdec.drafters.base import Drafter, DraftRun
from specdec.drafters.points import Point, PointRun
from specdec.laws import Law
from specdec.models.target import TargetRun
from specdec.sampling import Sampling
from specdec.tree import TreeSpec
from specdec.trees.base import Growth, TreePolicy, TreeRun


class Stars(Drafter):
    """Roots with children that are the first tokens of the vocabulary: drafting them takes no time, and most are refused.

    Args:
        sizes: nodes of the trees, the root included, in the order of steps, again and again; 1 drafts nothing.
    """

    def __init__(self, sizes: Sequence[int]):
        self.sizes = as_ints("sizes", sizes, 1)

    def spec(self, sampling: Sampling) -> TreeSpec:
        most = max(self.sizes)
        return TreeSpec(frozenset({Law.POINT}), most, min(most - 1, 1), most - 1, by_depth=True, by_row=False)

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        return _StarsRun(self, batch)


class _StarsRun(PointRun):
    drafter: Stars
    steps = 0

    def enter(self, rows: list[int]) -> None:
        """Nothing is to be done, as nothing is kept of a text."""

    def points(self) -> list[list[Point]]:
        sizes = self.drafter.sizes
        size, self.steps = sizes[self.steps % len(sizes)], self.steps + 1
        return [
            [Point(token, 0, 0.0) for token in range(size - 1)] if left > 1 else [] for left in self.batch.host_left
        ]


class InTurn(TreePolicy):
    """Several policies that take turns, one for each step."""

    def __init__(self, policies: Sequence[TreePolicy]):
        self.policies = tuple(policies)
        # alone, it is its policy, and can be captured
        self.capturable = len(self.policies) == 1 and self.policies[0].capturable

    def spec(self, sampling: Sampling) -> TreeSpec:
        specs = [policy.spec(sampling) for policy in self.policies]
        most = (max(getattr(spec, name) for spec in specs) for name in ("nodes", "depth", "width"))
        return TreeSpec(frozenset().union(*(spec.laws for spec in specs)), *most, by_depth=True, by_row=False)

    def start(self, batch: Batch, last: TreeRun | None = None) -> TreeRun:
        return _InTurnRun(self, batch)


class _InTurnRun(TreeRun):
    policy: InTurn
    steps = 0

    def __init__(self, policy: InTurn, batch: Batch):
        super().__init__(policy, batch)
        self._runs = [each.start(batch) for each in policy.policies]

    def grow(self, coins: Coins) -> Growth:
        run, self.steps = self._runs[self.steps % len(self._runs)], self.steps + 1
        return (yield from run.grow(coins))
