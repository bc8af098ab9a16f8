"""Trees of fixed widths: every node at depth d has widths[d] children. A chain is widths of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from specdec.batch import Batch
from specdec.checks import as_int, as_ints, put
from specdec.laws import Law, as_law, drawn_laws
from specdec.sampling import Sampling
from specdec.tree import TreeSpec
from specdec.trees.base import TreePolicy, TreeRun
from specdec.trees.static import StaticRun


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

    @property
    def parents(self) -> tuple[int, ...]:
        """Of each node, as for `Static`."""
        parents, level = [-1], range(1)
        for width in self.widths:
            start = len(parents)
            parents += [node for node in level for _ in range(width)]
            level = range(start, len(parents))
        return tuple(parents)

    def spec(self, sampling: Sampling) -> TreeSpec:
        nodes = 1 + sum(accumulate(self.widths, lambda a, b: a * b))
        return TreeSpec(drawn_laws(self.law, sampling), nodes, len(self.widths), max(self.widths), by_depth=True)

    def start(self, batch: Batch, last: TreeRun | None = None) -> TreeRun:
        return last if last and last.serves(self, batch) else StaticRun(self, batch)


class Chain(Widths):
    """One path of `length` tokens, each drawn from the draft's law after the one before."""

    def __init__(self, length: int):
        length = as_int("length", length, 1, cure="use drafter=None to draft nothing")
        super().__init__((1,) * length, Law.IID)

    def __repr__(self) -> str:
        return f"Chain({len(self.widths)})"
