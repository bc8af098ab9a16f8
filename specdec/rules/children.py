"""The children of a node, and the law that each was drawn from given those before it, for every row at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specdec.laws import Law, is_random, is_struck
from specdec.tree import DraftTree


class Siblings:
    """The children of some nodes, one of every row for instance, in the order they were drawn.

    Args:
        tree: the trees.
        node: [batch] int64: the parents.
        dtype: the dtype of the target's laws, and of the children's.
        rows: [len(node)] int64: the rows of the parents; by default there is one parent in each row.
    """

    def __init__(self, tree: DraftTree, node: Tensor, dtype: torch.dtype = torch.float32, rows: Tensor | None = None):
        self._rows = rows = torch.arange(len(node), device=node.device) if rows is None else rows
        index = tree.topology.children[rows, node]
        self.index = index.clamp(min=0)  # [batch, width] int64: 0 where there is no child
        self.exists = (index > 0) & (tree.laws[rows[:, None], self.index] != Law.PADDING)  # [batch, width] bool
        self.tokens = tree.tokens[rows[:, None], self.index]  # [batch, width] int64
        self._tree, self._node, self._law, self._dtype = tree, node, tree.laws[rows, node][:, None], dtype

    @cached_property
    def weights(self) -> Tensor | None:
        """[batch, vocab], at least in `dtype`: the node's draft law, not normalised; None where all children are POINT."""
        if self._tree.draft_probs is None:
            return None
        # nodes that have no weights are leaves
        internal = self._node.clamp(max=self._tree.draft_probs.shape[1] - 1)
        weights = self._tree.draft_probs[self._rows, internal]
        return weights.to(torch.promote_types(weights.dtype, self._dtype))

    def child(self, slot: Tensor) -> ChildLaw:
        """The law of the child in place `slot` [batch, 1] int64; meaningless in rows without such a child."""
        token = self.tokens.gather(1, slot)
        weights = self.weights
        if weights is None:
            return ChildLaw(token, torch.ones_like(slot, dtype=torch.bool), None)
        rank = self.exists.cumsum(1) - 1
        own = rank.gather(1, slot)
        if self.index.shape[1] > 1:
            weights = _drop(weights, self.tokens, self.exists & is_struck(self._law, own, rank))
        point = ~is_random(self._law, own)
        total = weights.sum(1, keepdim=True)
        law = weights / total.masked_fill(point | (total == 0), torch.inf)
        return ChildLaw(token, point, law.to(self._dtype))


@dataclass(frozen=True, eq=False)
class ChildLaw:
    """The law that one child of every row was drawn from."""

    token: Tensor  # [batch, 1] int64: the child's token
    point: Tensor  # [batch, 1] bool: rows in which the law is certain of that token
    law: Tensor | None  # [batch, vocab]: the law in rows that are not `point`, 0 in the others; None if there are none

    def ratio(self, mass: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[batch, k]: min(1, mass / law) of `tokens` [batch, k] int64, by default the child's; 0 where the law is 0.

        mass: [batch, vocab].
        """
        tokens = self.token if tokens is None else tokens
        law = (tokens == self.token).to(mass.dtype)
        if self.law is not None:
            law = torch.where(self.point, law, self.law.gather(1, tokens))
        return (mass.gather(1, tokens) / law.masked_fill(law == 0, torch.inf)).clamp(max=1)

    def dense(self, like: Tensor) -> Tensor:
        """[batch, vocab]: the law of every row, of the shape and type of `like`."""
        sure = torch.zeros_like(like).scatter_(1, self.token, 1)
        return sure if self.law is None else torch.where(self.point, sure, self.law)

    def excess(self, mass: Tensor) -> Tensor:
        """[batch, vocab]: max(mass - law, 0), for a `mass` [batch, vocab] that is nowhere above 1."""
        if self.law is None:
            return mass.scatter(1, self.token, 0)
        rest = (mass - self.law).clamp_(min=0)
        return rest.scatter_(1, self.token, rest.gather(1, self.token).masked_fill(self.point, 0))

    def overlap(self, mass: Tensor) -> Tensor:
        """[batch, vocab]: min(mass, law), for a `mass` [batch, vocab] that is nowhere above 1."""
        own = mass.gather(1, self.token)
        if self.law is None:
            return torch.zeros_like(mass).scatter_(1, self.token, own)
        both = torch.minimum(mass, self.law)
        return both.scatter_(1, self.token, torch.where(self.point, own, both.gather(1, self.token)))


def _drop(weights: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """`weights` [batch, vocab] with weight 0 at those `tokens` [batch, k] for which `where` [batch, k] holds."""
    left = weights.gather(1, tokens).masked_fill(where, 0)
    return weights.scatter_reduce(1, tokens, left, "amin")  # the minimum: `tokens` may hold a token twice
