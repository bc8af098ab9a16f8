"""Trees of fixed widths: every node at depth d has widths[d] children. A chain is widths of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import as_int, as_ints, put
from specdec.coins import Coins
from specdec.laws import Law, as_law, drawn_laws
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Topology, TreeSpec
from specdec.trees.base import Frontier, Grown, Growth, TreePolicy, TreeRun
from specdec.trees.draw import draw


@dataclass(frozen=True)
class Widths(TreePolicy):
    """Every node at depth d gets widths[d] children under one law; the deepest nodes are leaves.

    Args:
        widths: children per node, from the root down.
        law: how siblings are drawn (at temperature 0 always the top widths[d], as POINT). SAMPLED_THEN_TOP is the
            draft of Hu et al., arXiv:2502.18779: no law with as many children is accepted more often.
    """

    widths: Sequence[int]
    law: Law = Law.SAMPLED_THEN_TOP

    capturable = True

    def __post_init__(self) -> None:
        cure = "a tree needs at least one level, and each level at least one child, as [4, 2, 1] has"
        put(self, widths=as_ints("widths", self.widths, 1, cure=cure), law=as_law(self.law))
        if not self.widths:
            raise ValueError(f"widths=(): {cure}.")

    def spec(self, sampling: Sampling) -> TreeSpec:
        nodes = 1 + sum(accumulate(self.widths, lambda a, b: a * b))
        return TreeSpec(drawn_laws(self.law, sampling), nodes, len(self.widths), max(self.widths), by_depth=True)

    def start(self, batch: Batch, last: TreeRun | None = None) -> TreeRun:
        return last if last and last.serves(self, batch) else _WidthsRun(self, batch)


class Chain(Widths):
    """One path of `length` tokens, each drawn from the draft's law after the one before."""

    def __init__(self, length: int):
        length = as_int("length", length, 1, cure="use drafter=None to draft nothing")
        super().__init__((1,) * length, Law.IID)

    def __repr__(self) -> str:
        return f"Chain({len(self.widths)})"


class _WidthsRun(TreeRun):
    policy: Widths

    def __init__(self, policy: Widths, batch: Batch):
        super().__init__(policy, batch)
        self._cut: dict[int, tuple[list[Topology], Tensor]] = {}  # results of `_shapes`, by depth

    def grow(self, coins: Coins) -> Growth:
        batch, law = self.batch, self.policy.law
        widths = self.policy.widths[: batch.max_depth]
        shapes, asked = self._shapes(len(widths))
        tokens = [batch.root[:, None]]
        laws, exists, probs, first = [], None, [], 1
        for width, shape in zip(widths, shapes, strict=False):
            logits = yield Frontier(tokens[-1], shape)
            level = draw(logits, width, law, batch.sampling, coins, first)
            first += level.tokens.shape[1]
            tokens.append(level.tokens)
            laws.append(_mark(level.laws, exists))
            probs.append(level.draft_probs)
            exists = _inherit(level.exists, exists, width)
        laws.append(_mark(torch.zeros_like(tokens[-1], dtype=torch.uint8), exists))
        draft_probs = torch.cat(probs, 1) if probs and probs[0] is not None else None
        tree = DraftTree(torch.cat(tokens, 1), shapes[-1], torch.cat(laws, 1), draft_probs)
        return Grown(tree, asked)

    def _shapes(self, levels: int) -> tuple[list[Topology], Tensor]:
        """The tree cut off after each depth, from the root alone to the whole, and `Grown.asked`; computed once."""
        if levels not in self._cut:
            self._cut[levels] = _shapes(self.policy.widths[:levels], len(self.batch), self.batch.device)
        return self._cut[levels]


def _shapes(widths: Sequence[int], batch: int, device: torch.device) -> tuple[list[Topology], Tensor]:
    parents, level, shapes = [-1], [0], []
    for depth, width in enumerate((*widths, 0)):
        index = torch.tensor(parents, device=device).expand(batch, -1)
        shapes.append(Topology(index, depth, max(widths[:depth], default=0)))
        inner = len(parents)
        parents += [node for node in level for _ in range(width)]
        level = list(range(inner, len(parents)))
    order = torch.arange(inner, device=device)
    scored = shapes[-2].parents.shape[1] if widths else 0  # the deepest level is never asked for
    return shapes, torch.where(order < scored, order, -1).expand(batch, -1)


def _inherit(exists: Tensor | None, parents: Tensor | None, width: int) -> Tensor | None:
    """Children exist where they were drawn and their parents exist."""
    if exists is None or parents is None:
        return exists
    return exists & parents.repeat_interleave(width, 1)


def _mark(laws: Tensor, exists: Tensor | None) -> Tensor:
    return laws if exists is None else torch.where(exists, laws, Law.PADDING)
