"""Any drafter, paused while its drafts take more time than they save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import as_float, check_callable, check_kind
from specdec.coins import Coins
from specdec.drafters.balance import Balance
from specdec.drafters.base import Drafter, DraftRun
from specdec.drafters.points import Point, PointRun
from specdec.models.target import TargetRun
from specdec.outcome import Outcome
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec


class Paused(Drafter):
    """Lets a drafter draft while that pays, and decodes without a draft while it does not.

    >>> Paused(ModelDrafter(draft))

    A run has a balance, counted in steps without a draft. A step with a draft changes it by the tokens that it gained, less the
    time that it took: tokens - seconds / seconds without a draft. What counts as gained is `Batch.gained`: while texts wait
    for a row, the tokens of all rows, in the mean; else what the row with most to come has come nearer to its end. The drafter
    drafts while the balance is positive; a step without a draft adds `share`, so every pause ends with a new attempt. The
    balance begins at `patience` and never exceeds 4 times that, so that what was gained long ago does not count for ever.

    Drafters that list points with their chances (`PointRun`: text drafters) draft less than all: as many of each row's first
    points as are expected to gain most, if that is more than their time, and if all of that time is left in the balance. What
    sizes take that were not measured yet follows from those that were; before the first draft, 8 more tokens of all rows are
    taken to add half a step. Chances are squared, as texts go on less like they did before than text drafters estimate: of
    nodes of SmolLM2's chats that they gave .5, .7, .8 and .9 it wrote .29, .54, .69 and .84.

    Bounded: whatever the drafter does, in each size of batch all rows have their `max_new_tokens` after at most `patience` +
    `share` x steps more than without a draft, so far as sizes take what was foreseen; drafters that list no points may lose one
    step's draft more. By default that is 1.64 of 64 steps, and with time 1 %. One step in 1 / `share` has no draft in any case,
    to time it: where drafts pay, that costs less than `share` of the tokens.

    Lossless with a lossless rule. Whether a step has a draft, and how many points, is decided by tokens and times of the steps
    before, so before any coin of this step is drawn. Given those, the trees are the drafter's own, drawn as they say, or their
    first points, which nobody draws, or roots alone, and in any case the rule gives the step's tokens the target's law. As that
    holds whatever happened before, the whole text has it.

    One decision holds for all rows, so a row's text depends on the rows beside it; without `seconds` it depends on the clock
    too, and a seed does not repeat a run. Nothing is carried over from run to run, nor into a smaller batch; what enters a row
    changes nothing, unless the drafter is begun anew for it. With captured stages the proposal as a whole runs on the host; a
    `TreeDrafter`'s scores are captured one by one.

    Args:
        drafter: any; in steps in which it is paused it is told that nothing was kept.
        patience: how many steps' time drafts may lose before they are paused. Draft models, whose trees are drafted whole, may
            want 2 to 3: unlucky steps come in rows.
        share: how much of the time later attempts may lose.
        seconds: (nodes) -> seconds of a step with a draft of so many nodes, the root included, and of 1 without a draft; a
            `specdec.theory.CostCurve`, for instance. None: the run's own steps are timed. Processes that share a model (tensor
            parallelism) need it, and the same in all, or they would draft different trees.
    """

    def __init__(
        self,
        drafter: Drafter,
        patience: float = 1.0,
        share: float = 0.01,
        seconds: Callable[[int], float] | None = None,
    ):
        check_kind("drafter", drafter, Drafter)
        if seconds is not None:
            check_callable("seconds", seconds, "pass a function of the number of nodes, such as a CostCurve, or None")
        self.drafter, self.seconds = drafter, seconds
        self.patience, self.share = as_float("patience", patience, "(0, inf)"), as_float("share", share, "(0, 1)")
        self.states, self.models = drafter.states, drafter.models

    def __repr__(self) -> str:
        return f"Paused({self.drafter}, patience={self.patience:g}, share={self.share:g})"

    def spec(self, sampling: Sampling) -> TreeSpec:
        spec = self.drafter.spec(sampling)
        return replace(spec, by_row=False, by_clock=spec.by_clock or self.seconds is None)

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        known = last if isinstance(last, _PausedRun) else None
        drafting = self.drafter.start(target, batch, known.drafting if known else None)
        return (known if known and drafting is known.drafting else _PausedRun(self, batch, drafting)).begun()


class _PausedRun(DraftRun):
    drafter: Paused

    def __init__(self, drafter: Paused, batch: Batch, drafting: DraftRun):
        super().__init__(drafter, batch)
        self.drafting = drafting
        self._nobody = torch.zeros_like(batch.lengths, dtype=torch.bool)  # [batch]

    def begun(self) -> _PausedRun:
        """This run, with nothing known."""
        self._balance = Balance(self.drafter.patience, self.drafter.share, self.drafter.seconds, len(self.batch))
        self._nodes: int | None = None  # of the trees of the last step, 0 without a draft; None if it was not asked
        self._asked = False  # whether it was asked in this step
        return self

    def states_known(self, rows: list[int]) -> dict[int, int]:
        return self.drafting.states_known(rows)

    def read(self, states: Tensor, start: Tensor, count: Tensor) -> None:
        self.drafting.read(states, start, count)

    @property
    def bytes(self) -> int:
        return self.drafting.bytes

    @property
    def enters(self) -> bool:
        return self.drafting.enters

    def enter(self, rows: list[int]) -> None:
        self.drafting.enter(rows)

    def reaches(self, row: int, wanted: int) -> int:
        return self.drafting.reaches(row, wanted)

    def propose(self, coins: Coins) -> DraftTree:
        if self._nodes is not None:
            # a row that a stop token ends has not come so far by its draft
            tokens = min(self.batch.gained, max(self._nodes, 1))
            self._balance.see(self._nodes, tokens, self.batch.seconds)
        tree = self._draft(coins) if self._balance.drafts else None
        self._nodes, self._asked = 0 if tree is None else tree.tokens.shape[1], True
        return self.batch.undrafted() if tree is None else tree

    def _draft(self, coins: Coins) -> DraftTree | None:
        """The drafter's trees; of points, as many of each row's first as are worth their time, None if none is."""
        if not isinstance(self.drafting, PointRun):
            return self.drafting.propose(coins)
        drafts = self.drafting.points()
        nodes = self._balance.affords(self._expected(drafts)) if any(drafts) else 0
        return self.drafting.tree([draft[:nodes] for draft in drafts]) if nodes else None

    def _expected(self, drafts: list[list[Point]]) -> np.ndarray:
        """[drafted node] float64: the tokens that `Batch.gained` is expected to count of each row's first 1, 2, ... points."""
        running = [(left, draft) for left, draft in zip(self.batch.host_left, drafts, strict=True) if left]
        chances = np.zeros((len(running), max(map(len, drafts))))
        for row, (_, draft) in zip(chances, running, strict=True):
            row[: len(draft)] = [point.chance**2 for point in draft]
        tokens = chances.cumsum(1)
        left = np.array([[left] for left, _ in running])
        return tokens.mean(0) if self.batch.waiting else left.max() - (left - tokens).max(0)

    def commit(self, outcome: Outcome) -> None:
        if not self._asked:  # but within a `Fallback` another drafter
            self._nodes = None
        self._asked = False
        self.drafting.commit(outcome.of_rows(self._nobody) if self._nodes == 0 else outcome)
