"""Two drafters in one: the second drafts for the rows in which the first finds nothing to say."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from specdec.checks import check_kind, put
from specdec.coins import Coins
from specdec.drafters.base import Acceptance, Context, Drafter
from specdec.laws import Law
from specdec.models.target import Target
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Topology, TreeSpec


class Fallback(Drafter):
    """Drafts with `first` where it has a draft, and with `second` elsewhere, row by row; more nest.

    >>> Fallback(SuffixDrafter(), ModelDrafter(draft))

    Args:
        first: says by an empty tree that it has nothing; best one that costs next to nothing.
        second: is not asked in steps in which every row has a draft already.
    """

    def __init__(self, first: Drafter, second: Drafter):
        for name, part in (("first", first), ("second", second)):
            check_kind(name, part, Drafter)
        self.first, self.second = first, second
        self.uses_hidden = first.uses_hidden or second.uses_hidden

    def __repr__(self) -> str:
        return f"Fallback({self.first}, {self.second})"

    @property
    def run(self) -> object:  # type: ignore[override] - of its parts, as another run may use one of them
        return self.first.run if self.first.run is self.second.run else None

    @run.setter
    def run(self, run: object) -> None:
        for part in (self.first, self.second):
            put(part, run=run)

    def spec(self, sampling: Sampling) -> TreeSpec:
        a, b = self.first.spec(sampling), self.second.spec(sampling)
        most = (max(getattr(s, name) for s in (a, b)) for name in ("nodes", "depth", "width"))
        flags = {"by_depth": a.by_depth and b.by_depth, "by_row": a.by_row and b.by_row}
        return TreeSpec(a.laws | b.laws, *most, **flags, by_clock=a.by_clock or b.by_clock)

    def start(self, target: Target, context: Context) -> None:
        self.first.start(target, context)
        self.second.start(target, context)
        self._has = torch.zeros_like(context.lengths, dtype=torch.bool)

    def propose(self, context: Context, coins: Coins) -> DraftTree:
        tree = self.first.propose(context, coins)
        self._has = (tree.laws[:, 1:] != Law.PADDING).any(1) | (context.row_depths < 1)  # [batch] bool
        if bool(self._has.all()):
            return tree
        return _where(self._has, tree, self.second.propose(context, coins))

    def commit(self, acceptance: Acceptance) -> None:
        # what a drafter did not draft is to it as if nothing had been accepted: it reads those tokens later
        for drafter, rows in ((self.first, self._has), (self.second, ~self._has)):
            path, keep = acceptance.path.where(rows[:, None], 0), acceptance.keep.where(rows, 0)
            drafter.commit(replace(acceptance, path=path, keep=keep))

    def patched(self) -> AbstractContextManager[None]:
        stack = _Both()
        stack.enter_context(self.first.patched())
        stack.enter_context(self.second.patched())
        return stack


class _Both(ExitStack):
    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()


def _where(rows: Tensor, a: DraftTree, b: DraftTree) -> DraftTree:
    """The trees of `a` in those rows [batch] bool, and of `b` in the others."""
    nodes = max(a.tokens.shape[1], b.tokens.shape[1])

    def choose(mine: Tensor, other: Tensor, missing: int) -> Tensor:
        padded = (torch.nn.functional.pad(t, (0, nodes - t.shape[1]), value=missing) for t in (mine, other))
        return torch.where(rows[:, None], *padded)

    shapes = a.topology, b.topology
    width = None if None in (shapes[0].width, shapes[1].width) else max(s.width or 0 for s in shapes)
    parents = choose(shapes[0].parents, shapes[1].parents, 0)
    topology = Topology(parents, max(s.depth for s in shapes), width)
    laws = choose(a.laws, b.laws, Law.PADDING)
    return DraftTree(choose(a.tokens, b.tokens, 0), topology, laws, _laws_where(rows, a.draft_probs, b.draft_probs))


def _laws_where(rows: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:  # the others' laws are never read in rows of POINT children
        return b if a is None else a
    nodes = max(a.shape[1], b.shape[1])
    a, b = (torch.nn.functional.pad(t, (0, 0, 0, nodes - t.shape[1])) for t in (a, b))
    return torch.where(rows[:, None, None], a, b)
