"""Two drafters in one: the second drafts for the rows in which the first has no draft."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import check_kind
from specdec.coins import Coins
from specdec.drafters.base import Drafter, DraftRun
from specdec.laws import Law
from specdec.models.target import TargetRun
from specdec.outcome import Outcome
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Topology, TreeSpec


class Fallback(Drafter):
    """Drafts with `first` where it has a draft, and with `second` elsewhere, row by row. Fallbacks may be nested.

    >>> Fallback(SuffixDrafter(), ModelDrafter(draft))

    Args:
        first: preferably one that costs next to nothing. A tree of the root alone means that it has no draft.
        second: called only in steps in which some row has no draft from `first`.
    """

    def __init__(self, first: Drafter, second: Drafter):
        for name, part in (("first", first), ("second", second)):
            check_kind(name, part, Drafter)
        self.first, self.second = first, second
        self.states = tuple(dict.fromkeys((*first.states, *second.states)))
        self.models = (*first.models, *second.models)

    def __repr__(self) -> str:
        return f"Fallback({self.first}, {self.second})"

    def spec(self, sampling: Sampling) -> TreeSpec:
        a, b = self.first.spec(sampling), self.second.spec(sampling)
        most = (max(getattr(s, name) for s in (a, b)) for name in ("nodes", "depth", "width"))
        flags = {"by_depth": a.by_depth and b.by_depth, "by_row": a.by_row and b.by_row}
        return TreeSpec(a.laws | b.laws, *most, **flags, by_clock=a.by_clock or b.by_clock)

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        known = (last.first, last.second) if isinstance(last, _FallbackRun) else (None, None)
        runs = [part.start(target, batch, run) for part, run in zip((self.first, self.second), known, strict=True)]
        return last if last and runs == list(known) else _FallbackRun(self, batch, *runs)


class _FallbackRun(DraftRun):
    def __init__(self, drafter: Fallback, batch: Batch, first: DraftRun, second: DraftRun):
        super().__init__(drafter, batch)
        self.first, self.second = first, second
        # the places of each drafter's states among those of both
        self._columns = [[drafter.states.index(i) for i in part.states] for part in (drafter.first, drafter.second)]
        self._has = torch.zeros_like(batch.lengths, dtype=torch.bool)  # [batch]: rows for which the first drafted

    def states_known(self, rows: list[int]) -> dict[int, int]:
        parts = zip((self.first, self.second), self._columns, strict=True)
        known = [run.states_known(rows) for run, columns in parts if columns]
        return {row: min(of[row] for of in known) for row in rows}

    def read(self, states: Tensor, start: Tensor, count: Tensor) -> None:
        for run, columns in zip((self.first, self.second), self._columns, strict=True):
            if columns:
                run.read(torch.stack([states[:, :, i] for i in columns], 2), start, count)

    @property
    def bytes(self) -> int:
        return self.first.bytes + self.second.bytes

    @property
    def enters(self) -> bool:
        return self.first.enters and self.second.enters

    def enter(self, rows: list[int]) -> None:
        self.first.enter(rows)
        self.second.enter(rows)

    def reaches(self, row: int, wanted: int) -> int:
        return min(self.first.reaches(row, wanted), self.second.reaches(row, wanted))

    def propose(self, coins: Coins) -> DraftTree:
        tree = self.first.propose(coins)
        drafted = (tree.laws[:, 1:] != Law.PADDING).any(1)
        self._has = drafted | (self.batch.left < 2)  # nothing can be drafted for a row's last token
        if bool(self._has.all()):
            return tree
        return _where(self._has, tree, self.second.propose(coins))

    def commit(self, outcome: Outcome) -> None:
        # Report keep = 0 to a drafter for rows that it did not draft for; it reads their tokens later.
        self.first.commit(outcome.of_rows(self._has))
        self.second.commit(outcome.of_rows(~self._has))


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
    if a is None or b is None:  # trees without `draft_probs` have POINT children, for which nothing is read
        return b if a is None else a
    nodes = max(a.shape[1], b.shape[1])
    a, b = (torch.nn.functional.pad(t, (0, 0, 0, nodes - t.shape[1])) for t in (a, b))
    return torch.where(rows[:, None, None], a, b)
