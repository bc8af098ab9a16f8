"""Trees of one fixed shape, chosen beforehand from measured acceptance (Medusa, arXiv:2401.10774; Sequoia, arXiv:2402.12374).

`specdec.theory.best_tree` finds the shape from measured acceptance rates and times; `experiments/calibrate_tree.py` measures
them for a pair of models. With children drawn without replacement this is Sequoia: its tree program, its sampling (algorithm 1)
and its verification (algorithm 2, `SiblingRejection`). Deviations: acceptance is known by depth where the paper has one vector,
and times are measured where it has one hardware curve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import as_parents, put
from specdec.coins import Coins
from specdec.laws import Law, as_law, drawn_laws
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Topology, TreeSpec
from specdec.trees.base import Frontier, Grown, Growth, TreePolicy, TreeRun
from specdec.trees.draw import draw

if TYPE_CHECKING:
    from specdec.trees.widths import Widths


@dataclass(frozen=True)
class Static(TreePolicy):
    """A tree of this shape every step.

    >>> Static([-1, 0, 0, 0, 1, 1, 4])  # the root has children 1, 2, 3; node 1 has children 4, 5; node 4 has child 6

    Args:
        parents: the parent of each node: parents[0] == -1 and 0 <= parents[i] < i. Siblings are drawn in this order.
        law: how siblings are drawn (at temperature 0 always the most probable ones, as POINT).
    """

    parents: Sequence[int]
    law: Law = Law.POINT

    capturable = True

    def __post_init__(self) -> None:
        put(self, parents=as_parents(self.parents), law=as_law(self.law))
        if len(self.parents) < 2:
            raise ValueError("parents=[-1]: this tree drafts nothing; use drafter=None.")

    def spec(self, sampling: Sampling) -> TreeSpec:
        plan = _plan(tuple(self.parents))
        width = max(group.width for level in plan for group in level)
        return TreeSpec(drawn_laws(self.law, sampling), len(self.parents), len(plan), width, by_depth=True)

    def start(self, batch: Batch, last: TreeRun | None = None) -> TreeRun:
        return last if last and last.serves(self, batch) else StaticRun(self, batch)


class StaticRun(TreeRun):
    """Grows trees of one shape.

    Args:
        policy: says of each node the parent, and how siblings are drawn.
        batch: the texts.
    """

    policy: Static | Widths

    def __init__(self, policy: Static | Widths, batch: Batch):
        super().__init__(policy, batch)
        self._plan = _plan(tuple(policy.parents))
        self._cut: dict[int, _Shapes] = {}  # by the depth that trees are cut at
        self._members: dict[tuple[int, ...], Tensor | slice] = {}

    def grow(self, coins: Coins) -> Growth:
        batch, plan = self.batch, self._plan[: self.batch.max_depth]
        shapes = self._shapes(len(plan))
        tokens = torch.zeros_like(shapes.whole.parents)
        tokens[:, 0] = batch.root
        laws = torch.zeros_like(tokens, dtype=torch.uint8)
        exists = torch.ones_like(tokens, dtype=torch.bool)
        probs: list[tuple[tuple[int, ...], Tensor]] = []
        for level, shape in zip(plan, shapes.levels, strict=True):
            members = tuple(node for group in level for node in group.nodes)
            logits = yield Frontier(tokens[:, self._index(members)], shape)
            for group in level:
                part, logits = logits[:, : len(group.nodes)], logits[:, len(group.nodes) :]
                drawn = draw(part, group.width, self.policy.law, batch.sampling, coins, group.first)
                end = group.first + drawn.tokens.shape[1]
                tokens[:, group.first : end] = drawn.tokens
                nodes = self._index(group.nodes)
                laws[:, nodes] = drawn.laws
                above = exists[:, nodes].repeat_interleave(group.width, 1)
                exists[:, group.first : end] = above if drawn.exists is None else above & drawn.exists
                if drawn.draft_probs is not None:
                    probs.append((group.nodes, drawn.draft_probs))
        tree = DraftTree(tokens, shapes.whole, torch.where(exists, laws, Law.PADDING), self._by_node(probs))
        return Grown(tree, shapes.asked)

    def _by_node(self, probs: list[tuple[tuple[int, ...], Tensor]]) -> Tensor | None:
        """[batch, node, vocab] up to the last node with children; zeros at leaves before it."""
        if not probs:
            return None
        batch, _, vocab = probs[0][1].shape
        table = probs[0][1].new_zeros((batch, 1 + max(max(nodes) for nodes, _ in probs), vocab))
        for nodes, law in probs:
            table[:, self._index(nodes)] = law
        return table

    def _index(self, nodes: tuple[int, ...]) -> Tensor | slice:
        """Of nodes side by side a slice; of others a tensor made once and for all: indexing by a list waits for a copy."""
        if nodes not in self._members:
            first, end = nodes[0], nodes[-1] + 1
            side_by_side = nodes == (*range(first, end),)
            self._members[nodes] = slice(first, end) if side_by_side else torch.tensor(nodes, device=self.batch.device)
        return self._members[nodes]

    def _shapes(self, levels: int) -> _Shapes:
        if levels not in self._cut:
            self._cut[levels] = _shapes(self._plan[:levels], len(self.batch), self.batch.device)
        return self._cut[levels]


class _Shapes(NamedTuple):
    """The shapes of a tree that is cut off at some depth."""

    levels: list[Topology]  # for each level, the nodes asked for up to it
    whole: Topology
    asked: Tensor  # `Grown.asked`


@dataclass(frozen=True)
class _Group:
    """Nodes of one level that have `width` children each, which are numbered from `first` on, siblings together."""

    width: int
    nodes: tuple[int, ...]
    first: int


@lru_cache(maxsize=64)
def _plan(parents: tuple[int, ...]) -> tuple[tuple[_Group, ...], ...]:
    """The tree level by level. Nodes are renumbered: breadth first, and in a level those with most children first."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    levels, numbers, count, level = [], {0: 0}, 1, [0]
    while level := [node for node in level if children[node]]:
        groups = []
        for width in sorted({len(children[node]) for node in level}, reverse=True):
            family = [node for node in level if len(children[node]) == width]
            groups.append(_Group(width, tuple(numbers[node] for node in family), count))
            for child in (child for node in family for child in children[node]):
                numbers[child], count = count, count + 1
        levels.append(tuple(groups))
        level = sorted((child for node in level for child in children[node]), key=numbers.__getitem__)
    return tuple(levels)


def _shapes(plan: Sequence[tuple[_Group, ...]], batch: int, device: torch.device) -> _Shapes:
    def topology(parents: list[int], depth: int) -> Topology:
        width = max(Counter(parents[1:]).values(), default=0)
        return Topology(torch.tensor(parents, device=device).expand(batch, -1), depth, width)

    parents, asked, levels = [-1], {}, []  # asked: when each node is
    for depth, level in enumerate(plan):
        for node in (node for group in level for node in group.nodes):
            asked[node] = len(asked)
        levels.append(topology([asked.get(parents[node], -1) for node in asked], depth))
        parents += [node for group in level for node in group.nodes for _ in range(group.width)]
    order = torch.tensor([asked.get(node, -1) for node in range(len(parents))], device=device)
    return _Shapes(levels, topology(parents, len(plan)), order.expand(batch, -1))
