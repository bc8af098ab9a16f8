"""The base of drafters that can score any node: they grow the trees of a policy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from copy import copy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import check_kind, check_logits
from specdec.coins import Coins
from specdec.drafters.base import Drafter, DraftRun
from specdec.outcome import Outcome
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec
from specdec.trees.base import Frontier, TreePolicy, TreeRun, grow_tree
from specdec.trees.widths import Chain


class TreeDrafter(Drafter):
    """Grows the trees of a policy. Its run, a `TreeDraftRun`, scores nodes.

    Args:
        tree: the tree policy; a chain of 4 by default.

    Class attributes:
        capturable_scores: whether the work of `score` on the device depends on shapes and on the key of `prepare` alone.
    """

    capturable_scores: bool = False

    def __init__(self, tree: TreePolicy | None = None):
        cure = "pass a tree policy such as Chain(4) or Widths([4, 2, 1])"
        check_kind("tree", tree, (TreePolicy, type(None)), cure)
        self.tree = Chain(4) if tree is None else tree

    def with_tree(self, tree: TreePolicy) -> Self:
        """The same drafter, which grows the trees of another policy."""
        check_kind("tree", tree, TreePolicy)
        made = copy(self)
        made.tree = tree
        return made

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        """Whether the whole stage can be captured. If the host grows the trees, `capturable_scores` captures single scores."""
        return self.capturable_scores and self.tree.capturable

    def spec(self, sampling: Sampling) -> TreeSpec:
        return self.tree.spec(sampling)


class TreeDraftRun(DraftRun):
    """Grows the trees of the drafter's policy. Override `score`.

    Args:
        drafter: the drafter that this is a run of.
        batch: the texts.
        last: a run of an earlier batch.
        parts: what it is made of besides: a run of the same parts lies in the same tensors.
    """

    drafter: TreeDrafter

    def __init__(self, drafter: TreeDrafter, batch: Batch, last: DraftRun | None = None, *parts: object):
        super().__init__(drafter, batch)
        self.tree: TreeRun = drafter.tree.start(batch, last.tree if isinstance(last, TreeDraftRun) else None)
        self._parts = drafter, batch, self.tree, *parts
        self._nodes = drafter.tree.spec(batch.sampling).nodes
        # [batch, nodes] int64: `Grown.asked` of the last tree, and -1 beyond its nodes
        self.asked = torch.full((len(batch), self._nodes), -1, device=batch.device)

    def begun(self, last: DraftRun | None) -> DraftRun:
        """`last`, begun anew, if it is made of the same parts, so that what was captured with it holds; else this run."""
        if not isinstance(last, type(self)) or any(a is not b for a, b in zip(self._parts, last._parts, strict=True)):
            return self
        last.asked.fill_(-1)
        return last

    def prepare(self, frontier: Frontier) -> Hashable:
        """Return a key of all host values that `score` uses, but for shapes. Called on the host before every `score`."""
        return None

    @abstractmethod
    def score(self, frontier: Frontier) -> Tensor:
        """[batch, count, vocab]: logits after the nodes of the frontier. A tree's first frontier is its root alone.

        NaN, inf, or -inf for all tokens are reported as a fault of the drafter after the step.
        """

    def propose(self, coins: Coins) -> DraftTree:
        if self.batch.max_depth == 0:
            self.asked.fill_(-1)
            return self.batch.undrafted()
        broken = torch.zeros_like(self.batch.lengths, dtype=torch.bool)  # [batch]: rows with logits that are no law

        def checked(frontier: Frontier) -> Tensor:
            logits = self._scored(frontier)
            broken.logical_or_(~logits.amax(-1).isfinite().all(1))
            return logits

        grown = grow_tree(self.tree, coins, self._nodes, checked)
        self.asked.fill_(-1)[:, : grown.asked.shape[1]] = grown.asked
        # A root of -1 marks a broken row: `DraftTree.invalid` finds it, and the host learns of it with the step.
        return replace(grown.tree, tokens=grown.tree.tokens.masked_fill(broken[:, None], -1))

    def _scored(self, frontier: Frontier) -> Tensor:
        """Call `score` and check its result; if scores are captured one by one, replay it."""

        def drafted(frontier: Frontier) -> Tensor:
            # What is drawn from logits that are no law may be no token; the host learns of the fault after the step.
            logits = self.score(replace(frontier, tokens=frontier.tokens.clamp(max=self.batch.vocab - 1)))
            shape = (*frontier.tokens.shape, self.batch.vocab)
            axes, device = "[batch, count, vocab]", frontier.tokens.device
            check_logits(f"{type(self).__name__}.score", logits, axes, shape, device)
            return logits

        key = id(self), self.prepare(frontier)
        if not self.drafter.capturable_scores:
            return drafted(frontier)
        return self.batch.stages.perform(key, drafted, None, frontier)

    def commit(self, outcome: Outcome) -> None:
        self.tree.commit(outcome)
