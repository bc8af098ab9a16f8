"""What drafters that can score a node have in common: they grow the trees of a policy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from specdec.checks import check_kind, check_logits
from specdec.coins import Coins
from specdec.drafters.base import Acceptance, Context, Drafter
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec, root_only
from specdec.trees.base import Frontier, TreePolicy, drive
from specdec.trees.widths import Chain


class TreeDrafter(Drafter):
    """Grows the trees of a policy. Override `score`, and `start` if there is something to set up.

    Args:
        tree: the tree policy; a chain of 4 by default.
    """

    # [batch, node] int64: `Grown.asked` of the last tree, -1 for nodes that it has not. It stays in one place as long as that
    # is possible: what was captured writes it there, and reads it there.
    asked: Tensor | None = None
    capturable_scores: bool = False  # True if what `score` does to the device depends only on `prepare`

    def __init__(self, tree: TreePolicy | None = None):
        cure = "pass a tree policy such as Chain(4) or Widths([4, 2, 1])"
        check_kind("tree", tree, (TreePolicy, type(None)), cure)
        self.tree = Chain(4) if tree is None else tree

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        """As a whole; where trees are grown on the host, `capturable_scores` lets scores be, one by one."""
        return self.capturable_scores and self.tree.capturable

    def spec(self, sampling: Sampling) -> TreeSpec:
        return self.tree.spec(sampling)

    def prepare(self, frontier: Frontier, context: Context) -> Hashable:
        """Called before every `score`, on the host. Return a key of all host values that `score` uses, but for shapes."""
        return None

    @abstractmethod
    def score(self, frontier: Frontier, context: Context) -> Tensor:
        """[batch, count, vocab]: logits after the nodes of the frontier. In each tree the root comes first, alone.

        Each must give a law: NaN, inf or -inf for all tokens are told as the drafter's fault after the step.
        """

    def propose(self, context: Context, coins: Coins) -> DraftTree:
        nodes = self.tree.spec(context.sampling).nodes
        if context.max_depth == 0:
            tree = root_only(context.root)
            self.remember(tree.topology.parents, nodes)
            return tree

        broken = torch.zeros_like(context.lengths, dtype=torch.bool)  # [batch] bool: rows with logits that are no law

        def drafted(frontier: Frontier) -> Tensor:
            logits = self.score(frontier, context)
            shape = (*frontier.tokens.shape, context.vocab)
            check_logits(f"{type(self).__name__}.score", logits, "[batch, count, vocab]", shape, frontier.tokens.device)
            return logits

        def checked(frontier: Frontier) -> Tensor:
            key = id(self), self.prepare(frontier, context)
            if not self.capturable_scores:
                logits = drafted(frontier)
            else:
                logits = context.engine.perform(key, drafted, None, frontier)
            broken.logical_or_(~logits.amax(-1).isfinite().all(1))
            return logits

        grown = drive(self.tree, context, coins, checked)
        self.remember(grown.asked, nodes)
        # no token is the root's: `DraftTree.invalid` tells the host with the step
        return replace(grown.tree, tokens=grown.tree.tokens.masked_fill(broken[:, None], -1))

    def remember(self, asked: Tensor, nodes: int) -> None:
        """Set `asked`, to `Grown.asked` [batch, <= nodes] int64 of a tree of which `nodes` is the largest size."""
        shape, held = (len(asked), nodes), self.asked
        if held is None or (held.shape, held.device) != (shape, asked.device):
            held = self.asked = asked.new_empty(shape)
        held.fill_(-1)[:, : asked.shape[1]] = asked

    def commit(self, acceptance: Acceptance) -> None:
        self.tree.commit(acceptance)
