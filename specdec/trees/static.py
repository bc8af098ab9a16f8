"""Trees of one fixed shape, chosen beforehand from measured acceptance (Medusa, arXiv:2401.10774; Sequoia, arXiv:2402.12374).

`specdec.theory.best_tree` finds the shape from measured acceptance rates and times; `specdec.tune` measures them for a target
and its drafters, and looks at the best shapes more closely. With children drawn without replacement this is Sequoia: its tree
program, its sampling (algorithm 1) and its verification (algorithm 2, `SiblingRejection`). Deviations: acceptance is known by
depth where the paper has one vector, and times are measured where it has one hardware curve.
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
from specdec.trees.draw import Children, draw

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
        self._indices: dict[tuple[int, ...], Tensor | slice] = {}

    def grow(self, coins: Coins) -> Growth:
        batch, plan = self.batch, self._plan[: self.batch.max_depth]
        shapes = self._shapes(len(plan))
        tokens, exists, laws, probs = [batch.root[:, None]], [], [], []  # level by level; exists: where not all do
        for level, shape in zip(plan, shapes.levels, strict=True):
            places = [self._index(group.places) for group in level]
            logits = yield Frontier(_joined([tokens[-1][:, own] for own in places]), shape)
            parts = zip(logits.split([len(group.places) for group in level], 1), level, strict=True)
            drawn = [draw(part, own.width, self.policy.law, batch.sampling, coins, own.first) for part, own in parts]
            tokens.append(_joined([each.tokens for each in drawn]))
            laws += [each.laws for each in drawn]
            probs += [each.draft_probs for each in drawn if each.draft_probs is not None]
            if any(each.exists is not None for each in drawn):
                exists = exists or [torch.ones_like(tokens[0], dtype=torch.bool)]
                exists.append(
                    _joined([_alive(each, exists[-1][:, own]) for each, own in zip(drawn, places, strict=True)])
                )
        by_node = torch.cat([*laws, torch.zeros_like(tokens[0], dtype=torch.uint8)], 1)[:, shapes.order]
        if exists:
            by_node = torch.where(torch.cat(exists, 1), by_node, Law.PADDING)
        tree = DraftTree(torch.cat(tokens, 1), shapes.whole, by_node, shapes.draft_probs(probs))
        return Grown(tree, shapes.order.expand(len(batch), -1))

    def _index(self, places: tuple[int, ...]) -> Tensor | slice:
        """Of places side by side a slice; of others a tensor made once and for all: indexing by a list waits for a copy."""
        if places not in self._indices:
            first, end = places[0], places[-1] + 1
            side_by_side = places == (*range(first, end),)
            self._indices[places] = (
                slice(first, end) if side_by_side else torch.tensor(places, device=self.batch.device)
            )
        return self._indices[places]

    def _shapes(self, levels: int) -> _Shapes:
        if levels not in self._cut:
            self._cut[levels] = _shapes(self._plan[:levels], len(self.batch), self.batch.device)
        return self._cut[levels]


class _Shapes(NamedTuple):
    """The shapes of a tree that is cut off at some depth."""

    levels: list[Topology]  # for each level, the nodes asked for up to it
    whole: Topology
    order: Tensor  # [node] int64: when each is asked for, -1 if never
    inner: Tensor | None  # the same up to the last node with children; None if that is 0, 1, 2, ...

    def draft_probs(self, probs: list[Tensor]) -> Tensor | None:
        """[batch, internal, vocab], of laws in the order in which nodes are asked for; zeros at leaves."""
        if not probs:
            return None
        asked = torch.cat(probs, 1)
        return asked if self.inner is None else torch.nn.functional.pad(asked, (0, 0, 0, 1))[:, self.inner]


class _Group(NamedTuple):
    """Nodes of one level that have `width` children each, which are numbered from `first` on, siblings together."""

    width: int
    places: tuple[int, ...]  # among the nodes of their depth
    first: int


def _alive(children: Children, parents: Tensor) -> Tensor:
    """[batch, count * width] bool: which children exist, of parents [batch, count] bool that exist or do not."""
    width = children.tokens.shape[1] // parents.shape[1]
    above = parents.repeat_interleave(width, 1)
    return above if children.exists is None else above & children.exists


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@lru_cache(maxsize=64)
def _plan(parents: tuple[int, ...]) -> tuple[tuple[_Group, ...], ...]:
    """The tree level by level. Nodes are renumbered: breadth first, and in a level those with most children first."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    levels, numbers, start, count, level = [], {0: 0}, 0, 1, [0]
    while level := [node for node in level if children[node]]:
        groups, following = [], count
        for width in sorted({len(children[node]) for node in level}, reverse=True):
            family = [node for node in level if len(children[node]) == width]
            groups.append(_Group(width, tuple(numbers[node] - start for node in family), count))
            for child in (child for node in family for child in children[node]):
                numbers[child], count = count, count + 1
        levels.append(tuple(groups))
        start, level = following, sorted((c for node in level for c in children[node]), key=numbers.__getitem__)
    return tuple(levels)


def _shapes(plan: Sequence[tuple[_Group, ...]], batch: int, device: torch.device) -> _Shapes:
    def topology(parents: list[int], depth: int) -> Topology:
        width = max(Counter(parents[1:]).values(), default=0)
        return Topology(torch.tensor(parents, device=device).expand(batch, -1), depth, width)

    parents, asked, levels, start = [-1], {}, [], 0  # asked: when each node is; start: the first node of a level
    for depth, level in enumerate(plan):
        nodes = [(start + place, group.width) for group in level for place in group.places]
        asked |= {node: len(asked) + i for i, (node, _) in enumerate(nodes)}
        levels.append(topology([asked.get(parents[node], -1) for node in asked], depth))
        start = len(parents)
        parents += [node for node, width in nodes for _ in range(width)]
    order = torch.tensor([asked.get(node, -1) for node in range(len(parents))], device=device)
    inner = None if [*asked] == [*range(len(asked))] else order[: max(asked) + 1]
    return _Shapes(levels, topology(parents, len(plan)), order, inner)
