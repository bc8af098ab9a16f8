"""Runs that are there to be timed: trees of several sizes, one after the other in one run, so that drift hits all alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from specdec.batch import Batch
from specdec.checks import as_ints
from specdec.coins import Coins
from specdec.drafters import BlockDrafter, TreeDrafter
from specdec.drafters.base import Drafter, DraftRun
from specdec.drafters.points import Point, PointRun
from specdec.engines.base import Engine
from specdec.laws import Law
from specdec.models.target import TargetRun
from specdec.rules import BlockVerification, Rule, SiblingRejection
from specdec.sampling import Sampling
from specdec.tree import TreeSpec
from specdec.trees import Widths
from specdec.trees.base import Growth, TreePolicy, TreeRun
from specdec.tuning.conditions import Conditions, rules
from specdec.tuning.offers import Offer

# Sizes of trees without a drafter.
SIZES = (1, 2, 4, 8, 16, 32)
# The deepest trees that are looked for.
DEEPEST = 8
# Steps of a run that are not counted: they make constants and fill caches.
COLD = 2
# How often each size is timed in a run, and how many steps a run has at least.
_TURNS, _LEAST = 3, 9
# Of trees that are timed with a drafter, each of another size: two depths, as chains and wide.
_SHAPES = ((1, 1), (3, 3), (1,) * 5, (3, 2, 1, 1, 1))


@dataclass(frozen=True)
class Probe:
    """A run that is timed.

    Args:
        name: of the drafter; None without one.
        drafter: of steps whose sizes tell what was drafted.
        rule: the rule.
        parents: the trees by their sizes.
        engine: of this run alone.
    """

    name: str | None
    drafter: Drafter
    rule: Rule
    parents: Mapping[int, Sequence[int]]
    engine: Engine

    @property
    def steps(self) -> int:
        return COLD + max(_TURNS * len(self.parents), _LEAST)


def deepest(drafter: TreeDrafter) -> int:
    """The deepest tree that a drafter can grow."""
    return min(drafter.net.depth, DEEPEST) if isinstance(drafter, BlockDrafter) else DEEPEST


def probes(offers: Sequence[Offer], conditions: Conditions) -> list[Probe]:
    """The runs to be timed: of trees without a drafter, and of each drafter that grows trees, of the first under each rule.

    What a rule takes does not depend on who drafted.
    """
    apart = conditions.engine().static_shapes  # captured steps have one shape in a run
    sizes = [size for size in SIZES if size <= conditions.target.vocab]
    made = []
    # steps without a draft have a run to themselves, as they have in use: after larger ones they take longer
    for group in [[size] for size in sizes] if apart else [[1], sizes[1:]]:
        stars = {size: [-1, *[0] * (size - 1)] for size in group}
        made.append(Probe(None, Stars(group), SiblingRejection(), stars, conditions.engine()))
    timed = rules(conditions.sampling)  # the later drafters under the first only, see `Prices.other`
    for offer in offers:
        if not isinstance(offer.drafter, TreeDrafter):
            continue
        for rule in timed:
            for group in _in_runs(_trees(deepest(offer.drafter), rule), offer.drafter, apart):
                parents = {len(tree.parents): tree.parents for tree in group}
                drafter = offer.drafter.with_tree(InTurn(group))
                made.append(Probe(offer.name, drafter, rule, parents, conditions.engine()))
        timed = timed[:1]
    return made


def _trees(deepest: int, rule: Rule) -> list[Widths]:
    """Chains, and trees unless the rule is for chains only."""
    wanted = [shape[:deepest] for shape in _SHAPES if max(shape) == 1 or not isinstance(rule, BlockVerification)]
    return [Widths(shape) for shape in dict.fromkeys(wanted)]


def _in_runs(trees: Sequence[Widths], drafter: TreeDrafter, apart: bool) -> list[list[Widths]]:
    """Which trees take turns in one run. A block is as deep as the deepest tree of its run."""

    def run(tree: Widths) -> object:
        return tree if apart else len(tree.widths) if isinstance(drafter, BlockDrafter) else None

    return [[*group] for _, group in groupby(trees, run)]


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
