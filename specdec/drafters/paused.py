"""Any drafter, paused while its drafts take more time than they save."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from statistics import median_low

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import as_float, check_callable, check_kind
from specdec.coins import Coins
from specdec.drafters.base import Drafter, DraftRun
from specdec.models.target import TargetRun
from specdec.outcome import Outcome
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec

_RECENT = 5  # times that are kept of a kind of step: their median does not mind that one was interrupted


class Paused(Drafter):
    """Lets a drafter draft while that pays, and decodes without a draft while it does not.

    >>> Paused(ModelDrafter(draft))

    A run has a balance, in units of a step without a draft. A step with a draft changes it by the tokens that the draft added
    to each row, less the time that it took longer: 1 + accepted - seconds / seconds without a draft. The drafter drafts while
    the balance is positive; a step without a draft adds `share`, so that every pause ends with a new attempt. The balance
    begins at `patience` and never exceeds it, so what was gained long ago does not count when the texts change.

    Whatever the drafter does, a run so takes at most `patience` + `share` x its steps more steps' time than without a draft,
    and the loss of one step, as far as the times are known: of a tree's size from its second step on. While drafts pay, one
    step in 1 / `share` goes without, to time it: that costs less than `share` of the tokens.

    Lossless with any lossless rule. Whether a step has a draft is decided by tokens and times of the steps before, so before
    any coin of this step is drawn. Given those, the trees are the drafter's own, drawn as they say, or roots alone; either way
    the rule gives the step's tokens the target's law. As that holds whatever has happened before, the whole text has it.

    One decision holds for all rows, so a row's text depends on the rows beside it, and unless `seconds` is given on the clock:
    then a seed does not repeat a run, though its law is the target's all the same. Nothing is carried over from run to run.
    With captured stages the proposal as a whole runs on the host; a `TreeDrafter`'s scores are still captured one by one.

    Args:
        drafter: is told that nothing was accepted in steps in which it is paused.
        patience: steps' time that drafts may lose at once before they are paused: unlucky steps come in rows.
        share: of the time, how much attempts may lose in the long run.
        seconds: (nodes) -> seconds of a step with a draft of so many nodes, the root included, and for 1 without a draft: a
            `specdec.theory.CostCurve`, for instance. None: the run's own steps are timed. Processes that share a model (tensor
            parallelism) need it, and the same in all, or they would draft different trees.
    """

    def __init__(
        self,
        drafter: Drafter,
        patience: float = 2.0,
        share: float = 0.02,
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
        return replace(self.drafter.spec(sampling), by_row=False, by_clock=self.seconds is None)

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        known = last if isinstance(last, _PausedRun) else None
        drafting = self.drafter.start(target, batch, known.drafting if known else None)
        return (known if known and drafting is known.drafting else _PausedRun(batch, drafting)).begun(self)


class _PausedRun(DraftRun):
    def __init__(self, batch: Batch, drafting: DraftRun):
        super().__init__(batch)
        self.drafting = drafting
        self._nobody = torch.zeros_like(batch.lengths, dtype=torch.bool)  # [batch]

    def begun(self, drafter: Paused) -> _PausedRun:
        """This run, with nothing known."""
        self._balance = Balance(drafter.patience, drafter.share, drafter.seconds)
        self._proposed: tuple[int, float] | None = None  # in this step: nodes, 0 without a draft, and when it began
        self._last: tuple[int, float, Tensor] | None = None  # the same of the step before, and `Outcome.keep`
        return self

    def states_known(self) -> list[int]:
        return self.drafting.states_known()

    def read(self, states: Tensor, start: Tensor, count: Tensor) -> None:
        self.drafting.read(states, start, count)

    def enter(self, rows: list[int]) -> None:
        self.drafting.enter(rows)
        self._last = None  # the time that prompts take is no step's

    def propose(self, coins: Coins) -> DraftTree:
        now = time.perf_counter()
        if self._last is not None:
            nodes, began, keep = self._last
            accepted = [n - 1 for n in keep.tolist() if n]  # the loop has waited for the device already
            self._balance.see(nodes, sum(accepted) / max(len(accepted), 1), now - began)
        tree = self.drafting.propose(coins) if self._balance.drafts else None
        self._proposed = (0 if tree is None else tree.tokens.shape[1]), now
        return self.batch.undrafted() if tree is None else tree

    def commit(self, outcome: Outcome) -> None:
        # within a `Fallback` it is not asked in every step: where the step ended that it was asked in is then not known
        self._last = None if self._proposed is None else (*self._proposed, outcome.keep)
        drafted = self._proposed is None or self._proposed[0] > 0
        self._proposed = None
        self.drafting.commit(outcome if drafted else outcome.of_rows(self._nobody))


class Balance:
    """What drafts may still lose, in steps without a draft; of numbers on the host only. See `Paused` for the arguments."""

    def __init__(self, patience: float, share: float, seconds: Callable[[int], float] | None = None):
        self.left, self.patience, self.share, self._given = patience, patience, share, seconds
        self._times: dict[int, deque[float]] = {}  # the newest seconds of steps, by nodes; 0 without a draft
        self._drafted = 0  # steps since the last one without a draft

    @property
    def drafts(self) -> bool:
        """Whether the next step is to have a draft."""
        timed = self._given is not None or (0 in self._times and self._drafted < 1 / self.share)
        return timed and self.left > 0

    def see(self, nodes: int, accepted: float, seconds: float) -> None:
        """A step with trees of so many nodes, 0 without a draft: accepted tokens per row, and how long it took."""
        self._times.setdefault(nodes, deque(maxlen=_RECENT)).append(seconds)
        self._drafted = self._drafted + 1 if nodes else 0
        gained = 1 + accepted - self._slower(nodes) if nodes else self.share
        self.left = min(self.left + gained, self.patience)

    def _slower(self, nodes: int) -> float:
        """The time of a step with such trees, over that of a step without a draft."""
        if self._given is not None:
            return self._given(nodes) / self._given(1)
        if len(self._times[nodes]) < 2:  # the first may have compiled, captured or warmed something up
            return 1.0
        return median_low(self._times[nodes]) / median_low(self._times[0])
