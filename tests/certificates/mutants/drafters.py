"""Planted in the drafter: what it says is not how it drew."""

from __future__ import annotations

from dataclasses import replace

import torch

from certificates.cases import Case, paused
from certificates.mutants.mutant import DRAFT, Mutant
from specdec import DraftTree, Law, Topology, TreeSpec
from specdec.drafters import Drafter
from specdec.drafters import paused as pausing
from specdec.testing import Table, TabularDrafter
from specdec.trees import Chain, Widths


class DropsUnlikely(TabularDrafter):
    """Samples, then drops the drawn token when it is improbable (a prune by the outcome)."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        if tree.draft_probs is None:
            return tree
        probs = tree.draft_probs[:, :1].gather(2, tree.tokens[:, 1:2, None])[..., 0]
        return replace(
            tree, laws=torch.cat([tree.laws[:, :1], torch.where(probs < 0.5, Law.PADDING, tree.laws[:, 1:])], 1)
        )


class ArgmaxWithSoftmax(TabularDrafter):
    """Drafts the most probable token and claims that it was sampled."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        if tree.draft_probs is not None:
            tree.tokens[:, 1] = tree.draft_probs[:, 0].argmax(-1)
        return tree


class TopTakenForIid(TabularDrafter):
    """Drafts the top two and claims that they were independent samples."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        if tree.draft_probs is not None:
            tree.tokens[:, 1:3] = tree.draft_probs[:, 0].topk(2).indices
        return tree


class OneNoiseForAllSteps(TabularDrafter):
    """Every step draws with the coins of the first."""

    def propose(self, context, coins):
        step, coins.step = coins.step, 0
        tree = super().propose(context, coins)
        coins.step = step
        return tree


class DropsPointByDescendant(Drafter):
    """Drafts a certain token and a sampled one below it, and drops both when the sample is not token 0."""

    def spec(self, sampling):
        return TreeSpec(frozenset({Law.POINT, Law.IID}), nodes=3, depth=2, width=1)

    def propose(self, context, coins):
        depth = min(2, context.max_depth)
        root, batch = context.root[:, None], len(context.tokens)
        if depth < 2:
            return DraftTree(root, Topology(torch.full((batch, 1), -1), 0), torch.zeros_like(root, dtype=torch.uint8))
        weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).expand(batch, 1, 3)
        drawn = coins.picks(range(2, 3), weights)
        tokens = torch.cat([root, torch.ones_like(root), drawn], 1)
        kept = torch.tensor([[Law.POINT, Law.IID, Law.POINT]], dtype=torch.uint8).expand(batch, -1)
        dropped = torch.tensor([[Law.POINT, Law.PADDING, Law.PADDING]], dtype=torch.uint8)
        laws = torch.where(drawn == 0, kept, dropped)
        topology = Topology(torch.tensor([[-1, 0, 1]]).expand(batch, -1), 2)
        return DraftTree(tokens, topology, laws, torch.cat([weights, weights], 1))


class OrderedByProbability(TabularDrafter):
    """Draws two tokens without replacement, then tries the more probable one first."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        if tree.draft_probs is not None:
            probs = tree.draft_probs[:, 0].gather(1, tree.tokens[:, 1:3])
            tree.tokens[:, 1:3] = tree.tokens[:, 1:3].gather(1, probs.argsort(1, descending=True))
        return tree


PAIRS = Widths((2,), Law.WITHOUT_REPLACEMENT)


def pausing_by_what_was_drawn(self, coins):
    """`_PausedRun.propose` that decides on a pause when it has seen the draft."""
    tree = _propose(self, coins)
    return self.batch.undrafted() if tree.tokens.shape[1] > 1 and bool(tree.tokens[:, 1].eq(0).all()) else tree


_propose = pausing._PausedRun.propose
_DRAFTERS = {
    "sampled, then pruned by the drawn token's probability": (DropsUnlikely(DRAFT, Chain(1)), True),
    "sampled, then ranked by the drawn tokens' probability": (OrderedByProbability(DRAFT, PAIRS), True),
    "argmax draft with a softmax law": (ArgmaxWithSoftmax(DRAFT, Chain(1)), True),
    "top-k draft taken for independent samples": (TopTakenForIid(DRAFT, Widths((2,), Law.IID)), True),
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
