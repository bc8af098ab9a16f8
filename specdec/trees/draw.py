"""How the children of nodes are drawn from a draft's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.coins import Coins
from specdec.laws import Law
from specdec.sampling import Sampling


@dataclass(frozen=True, eq=False)
class Children:
    """The children of every node of a frontier: `count` nodes with `width` children each.

    Args:
        tokens: [batch, count * width] int64, siblings together, in the order they were drawn.
        exists: [batch, count * width] bool: which of them exist; None if all do.
        laws: [batch, count] uint8: the law of each parent's children.
        draft_probs: [batch, count, vocab]: the draft's law after each parent; None if nothing was drawn from it.
    """

    tokens: Tensor
    exists: Tensor | None
    laws: Tensor
    draft_probs: Tensor | None


def draw(logits: Tensor, width: int, law: Law, sampling: Sampling, coins: Coins, first: int) -> Children:
    """Draw `width` children for each node from the draft's law under `sampling`.

    Args:
        logits: [batch, count, vocab] raw draft logits of the parents.
        width: children per parent.
        law: how to draw. At temperature 0 a sampled law would be one-hot, so children are the top `width` of the raw
            logits instead, as POINT.
        first: node index that the first child will have; its siblings and cousins follow.
    """
    if width > logits.shape[-1] and (law != Law.IID or sampling.temperature == 0):
        raise ValueError(
            f"A node cannot have {width} different children: the vocabulary has {logits.shape[-1]} tokens."
        )
    if sampling.temperature == 0 or law == Law.POINT:
        tokens = logits.topk(width, -1).indices.flatten(1)
        return Children(tokens, None, torch.full_like(logits[..., 0], Law.POINT, dtype=torch.uint8), None)
    probs = sampling.probabilities(logits)
    laws = torch.full_like(probs[..., 0], law, dtype=torch.uint8)
    if law == Law.SAMPLED_THEN_TOP:
        tokens, exists, laws = _sampled_then_top(probs, width, laws, coins, first)
    else:
        tokens, exists = _sampled(probs, width, law, coins, first)
    return Children(tokens.flatten(1), None if exists is None else exists.flatten(1), laws, probs)


def _sampled(probs: Tensor, width: int, law: Law, coins: Coins, first: int) -> tuple[Tensor, Tensor | None]:
    """Tokens [batch, count, width], and which of them exist: a small support runs out without replacement."""
    batch, count, vocab = probs.shape
    if law == Law.IID:
        weights = probs[:, :, None].expand(-1, -1, width, -1).reshape(batch, count * width, vocab)
        return coins.picks(range(first, first + count * width), weights).view(batch, count, width), None
    weights, tokens, exists = probs.clone(), [], []
    for j in range(width):
        exists.append(weights.sum(-1) > 0)
        tokens.append(coins.picks(range(first + j, first + count * width, width), weights))
        weights.scatter_(-1, tokens[-1][..., None], 0)
    return torch.stack(tokens, -1), torch.stack(exists, -1)


def _sampled_then_top(probs: Tensor, width: int, laws: Tensor, coins: Coins, first: int):
    """Tokens and existence as `_sampled` gives them, and the laws.

    Where the k - 1 most probable tokens are the whole support, they are the only children, as POINT.
    """
    top = probs.topk(width - 1, -1)
    rest = probs.scatter(-1, top.indices, 0)
    left = rest.sum(-1) > 0
    token = coins.picks(range(first, first + probs.shape[1] * width, width), rest)
    tokens = torch.cat([token[..., None], top.indices], -1)
    exists = torch.cat([left[..., None], top.values > 0], -1)
    return tokens, exists, torch.where(left, laws, Law.POINT)
