"""Planted in the drafter: what it says is not how it drew."""

from __future__ import annotations

from dataclasses import replace

import torch
from small_drafters import Proposing, editing

from certificates.cases import Case, paused
from certificates.mutants.mutant import DRAFT, Mutant
from specdec import DraftTree, Law, TreeSpec
from specdec.drafters import paused as pausing
from specdec.testing import Table, TabularDrafter
from specdec.trees import Chain, Widths


def drops_unlikely(tree):
    """Samples, then drops the drawn token when it is improbable (a prune by the outcome)."""
    probs = tree.draft_probs[:, :1].gather(2, tree.tokens[:, 1:2, None])[..., 0]
    laws = torch.where(probs < 0.5, Law.PADDING, tree.laws[:, 1:])
    return replace(tree, laws=torch.cat([tree.laws[:, :1], laws], 1))


def argmax_with_softmax(tree):
    """Drafts the most probable token and claims that it was sampled."""
    tree.tokens[:, 1] = tree.draft_probs[:, 0].argmax(-1)
    return tree


def top_taken_for_iid(tree):
    """Drafts the top two and claims that they were independent samples."""
    tree.tokens[:, 1:3] = tree.draft_probs[:, 0].topk(2).indices
    return tree


def ordered_by_probability(tree):
    """Draws two tokens without replacement, then tries the more probable one first."""
    probs = tree.draft_probs[:, 0].gather(1, tree.tokens[:, 1:3])
    tree.tokens[:, 1:3] = tree.tokens[:, 1:3].gather(1, probs.argsort(1, descending=True))
    return tree


class EditedTable(TabularDrafter):
    """Grows such trees, and changes those that were sampled by `edit(tree)`."""

    def __init__(self, tree, edit):
        super().__init__(DRAFT, tree)
        self.edit = edit

    def start(self, target, batch, last=None):
        return editing(super().start(target, batch), lambda tree: tree if tree.draft_probs is None else self.edit(tree))


class OneNoiseForAllSteps(TabularDrafter):
    """Every step draws with the coins of the first."""

    def start(self, target, batch, last=None):
        run = super().start(target, batch)
        propose = run.propose

        def in_first_step(coins):
            steps = coins.steps
            coins.enter(range(coins.batch), coins.keys, [0] * coins.batch)
            tree = propose(coins)
            coins.enter(range(coins.batch), coins.keys, steps)
            return tree

        run.propose = in_first_step
        return run


class DropsPointByDescendant(Proposing):
    """Drafts a certain token and a sampled one below it, and drops both when the sample is not token 0."""

    def spec(self, sampling):
        return TreeSpec(frozenset({Law.POINT, Law.IID}), nodes=3, depth=2, width=1)

    def propose(self, batch, coins):
        if batch.max_depth < 2:
            return batch.undrafted()
        root = batch.root[:, None]
        weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).expand(len(batch), 1, 3)
        drawn = coins.picks(range(2, 3), weights)
        tokens = torch.cat([root, torch.ones_like(root), drawn], 1)
        kept = torch.tensor([[Law.POINT, Law.IID, Law.POINT]], dtype=torch.uint8).expand(len(batch), -1)
        dropped = torch.tensor([[Law.POINT, Law.PADDING, Law.PADDING]], dtype=torch.uint8)
        laws = torch.where(drawn == 0, kept, dropped)
        return DraftTree(tokens, batch.chain(3), laws, torch.cat([weights, weights], 1))


PAIRS = Widths((2,), Law.WITHOUT_REPLACEMENT)


def pausing_by_what_was_drawn(self, coins):
    """`_PausedRun.propose` that decides on a pause when it has seen the draft."""
    tree = _propose(self, coins)
    return self.batch.undrafted() if tree.tokens.shape[1] > 1 and bool(tree.tokens[:, 1].eq(0).all()) else tree


_propose = pausing._PausedRun.propose
_DRAFTERS = {
    "sampled, then pruned by the drawn token's probability": (EditedTable(Chain(1), drops_unlikely), True),
    "sampled, then ranked by the drawn tokens' probability": (EditedTable(PAIRS, ordered_by_probability), True),
    "argmax draft with a softmax law": (EditedTable(Chain(1), argmax_with_softmax), True),
    "top-k draft taken for independent samples": (EditedTable(Widths((2,), Law.IID), top_taken_for_iid), True),
    "point node dropped by its sampled descendant": (DropsPointByDescendant(), True),
    "paused when the draft has been seen": (
        paused(TabularDrafter(DRAFT, Chain(1))),
        True,
        (pausing._PausedRun, "propose", pausing_by_what_was_drawn),
    ),
    "one noise for all steps": (OneNoiseForAllSteps(Table(3, seed=2), Chain(1)), False),
}
IN_DRAFTERS = [
    Mutant(name, Case(drafter, merge=merge), tuple(patches)) for name, (drafter, merge, *patches) in _DRAFTERS.items()
]
