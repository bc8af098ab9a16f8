"""Sibling rejection along a tree, with one number in place of a residual law: the walk and the token emitted after it.

Owed at a node is at first the target's law p. Child x, drawn from a law l given its earlier siblings, is accepted with
probability r(x) / l(x), where r is what is owed, normalised; after a rejection (r - l)+ is owed. With w the weights that the
children were drawn by, not normalised, what is owed stays, up to its sum S,

    (p(x) - c w(x))+ for all tokens but the siblings, and a number for each of those:

- IID, WITHOUT_REPLACEMENT: l = w / W on the tokens that could be drawn, of weight W in all (for the latter, all but
  the earlier siblings), and (p - c w)+ / S - w / W is (p - (c + S / W) w) / S where that is positive: c grows by S / W.
  The token rejected had r < l: nothing is owed there, nor will be while c grows, so that it does not matter that later
  siblings drawn without replacement cannot be it.
- POINT: l is certain of x. What is owed at x is struck out, and c stays 0.
- SAMPLED_THEN_TOP: the first child x is drawn from w outside the others, T, which follow as points. Its rejection takes
  S / W of w, W being the weight of all but T, from what is owed outside T: c = 1 / W there, while (p - 0 w) stays owed on T.
  As T are siblings, their numbers are simply not touched. Each of them is then struck out as a point.

So siblings are a handful of numbers, all other tokens are one, c, and a pass over the vocabulary is needed only where
c grows: for S. No sum is a difference of larger ones: a draft that is nearly certain of its children loses no digits. And no
number is too large: what is left for the last draw may be as little as the least number there is, whose inverse is infinite.
Where the last draw's W is that little, weights off the siblings are therefore in units of it, as a power of two: no weight
there is above that W, and c grows by S times the share that it is of a draw's own W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec_kernels.reference.early_exit import all_false_cheaply
from specdec_kernels.reference.inverse_cdf import inverse_cdf
from specdec_kernels.reference.law import probabilities
from specdec_kernels.reference.laws import Law, excludes_elders, is_random

_LITTLE = 2.0**-64  # of what is left to draw: its inverse is far from infinite


def verify(
    logits: Tensor,  # [batch, node, vocab] of the target
    tokens: Tensor,  # [batch, node] int64
    children: Tensor,  # [batch, node, width] int64: in the order they were drawn, -1 where there is none
    laws: Tensor,  # [batch, node] uint8: how the children of each node were drawn; PADDING where there is no such node
    draft_probs: Tensor | None,  # [batch, internal, vocab]: by what weights; None if all children are POINT
    accept: Tensor,  # [batch, node] float64 in [0, 1): the coin that decides whether a node is accepted
    emit: Tensor,  # [batch, node] float64 in [0, 1): the coin that picks what is emitted after it
    depth: int,  # longest path, in edges
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    lenience: float = 1.0,  # children are accepted with probability r / (lenience l)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accept children from the root downwards.

    Returns:
        path [batch, depth + 1] int64: accepted nodes from the root; entries past `accepted` are unused.
        accepted [batch] int64: how many, without the root.
        token [batch] int64: drawn after the last of them from what is still owed there.
        invalid [batch] bool: rows in which logits that were read are no law (NaN or +inf, or all -inf).
    """
    rows, peaks = torch.arange(len(tokens), device=tokens.device), []

    def law(node: Tensor) -> Tensor:
        scores = logits[rows, node]
        peaks.append(scores.amax(-1))
        return probabilities(scores, temperature, top_k, top_p, min_p)

    path, accepted, token = walk(law, tokens, children, laws, draft_probs, accept, emit, depth, lenience)
    path = torch.nn.functional.pad(path, (0, depth + 1 - path.shape[1]))
    return path, accepted, token, ~torch.stack(peaks).isfinite().all(0)


def walk(
    law: Callable[[Tensor], Tensor],  # nodes [batch] int64 -> the target's laws [batch, vocab], which are changed
    tokens: Tensor,
    children: Tensor,
    laws: Tensor,
    draft_probs: Tensor | None,
    accept: Tensor,
    emit: Tensor,
    depth: int,
    lenience: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`verify` under laws from anywhere; other arguments and results as there."""
    node = torch.zeros_like(tokens[:, 0])  # [batch] int64: the deepest accepted node
    if depth == 0:
        return node[:, None], node, inverse_cdf(law(node), emit[:, 0])
    path, rows = [node], torch.arange(len(node), device=node.device)
    while True:
        index = children[rows, node]
        exists = (index > 0) & (laws.gather(1, index.clamp(min=0)) != Law.PADDING)
        index = torch.where(exists, index, 0)  # [batch, width]
        owed = _Owed(law(node), tokens.gather(1, index), exists)
        if draft_probs is not None:
            owed.draw(draft_probs[rows, node.clamp(max=draft_probs.shape[1] - 1)], laws[rows, node])  # beyond: leaves
        child = owed.try_children(index, accept.gather(1, index), lenience)
        if len(path) > depth or all_false_cheaply(child > 0):
            break
        node = torch.where(child > 0, child, node)  # rows that have stopped decide the same once more
        path.append(node)
    path = torch.stack(path, 1)
    accepted = (path[:, 1:] > path[:, :-1]).sum(1)
    return path, accepted, owed.pick(emit[rows, node])


class _Owed:
    """What the target's law owes at one node of every row: (rest - scale weights)+ off the siblings, `owed` on them."""

    def __init__(self, p: Tensor, tokens: Tensor, exists: Tensor):
        same = (tokens[:, :, None] == tokens[:, None]) & exists[:, None]
        self.first = exists & ~same.tril(-1).any(-1)  # [batch, width] bool: no earlier sibling has this token
        self.tokens, self.exists = tokens, exists  # [batch, width]
        self.owed = p.gather(1, tokens).where(self.first, 0)  # [batch, width]
        self.rest = p.scatter_add_(1, tokens, -self.owed)  # [batch, vocab]: exactly 0 at the siblings
        self.rest_total = self.rest.sum(1)  # [batch]
        self.draws = 0  # the first so many children may be draws, the others are points
        self.weights: Tensor | None = None  # [batch, vocab], if there are draws: w off the siblings, in units
        self.scale = torch.zeros_like(self.rest_total)  # [batch]: c, for weights in these units

    def draw(self, weights: Tensor, law: Tensor) -> None:
        """Children may have been drawn: by `weights` [batch, vocab], under `law` [batch]."""
        drawn = self.exists & is_random(law[:, None], self.exists.cumsum(1) - 1)
        self.draws = drawn.shape[1]
        while self.draws and all_false_cheaply(drawn[:, self.draws - 1]):
            self.draws -= 1
        if not self.draws:
            return
        dtype = self.rest.dtype
        weights = weights.to(torch.promote_types(weights.dtype, dtype))
        own = weights.gather(1, self.tokens)  # [batch, width]: w of the siblings
        weights = weights.scatter_add(1, self.tokens, -own.where(self.first, 0))
        could = own.where(self.first & drawn, 0)  # of those that could have been drawn
        left = torch.where(excludes_elders(law)[:, None], _from_here_on(could), could.sum(1, True))
        drawable = weights.sum(1, keepdim=True) + left  # [batch, width]: W
        unit = _unit(drawable.where(drawn, 1).amin(1, keepdim=True))
        self.weights = (weights if all_false_cheaply(unit[:, 0] < 1) else weights.div_(unit)).to(dtype)
        self.units = (unit / drawable).where(drawn, 0).to(dtype)  # [batch, width]: by which c grows, and S
        drawable = drawable.masked_fill(~drawn, torch.inf)
        self.chance = (own / drawable).masked_fill(~drawn, 1).to(dtype)  # [batch, width]: l(x) of each child
        # [batch, child, sibling]: l at the siblings' tokens, and anything at those that were drawn before
        self.shares = (could[:, None] / drawable[..., None]).clamp(max=1).to(dtype)

    def try_children(self, index: Tensor, coin: Tensor, lenience: float) -> Tensor:
        """The accepted one of the children `index` [batch, width], or 0: [batch] int64."""
        taken = torch.zeros_like(index[:, 0])
        for j in range(self.draws):
            trying, total = self.exists[:, j] & (taken == 0), self.rest_total + self.owed.sum(1)
            hit = trying & (coin[:, j] < self.owed[:, j] / total / (lenience * self.chance[:, j]))
            taken = torch.where(hit, index[:, j], taken)
            if not all_false_cheaply(trying & ~hit):
                self._reject(j, trying & ~hit, total)
        if self.draws < index.shape[1]:
            taken = torch.where(taken > 0, taken, self._first_point(index, coin, lenience))
        return taken

    def _first_point(self, index: Tensor, coin: Tensor, lenience: float) -> Tensor:
        """The accepted one of the children that are points, or 0: [batch] int64. Each that is rejected is struck out."""
        points, none = slice(self.draws, None), torch.iinfo(index.dtype).max
        owed = self.owed[:, points]
        total = self.rest_total[:, None] + _from_here_on(owed)
        chance = owed / total.where(owed > 0, 1) / lenience
        hit = self.exists[:, points] & (coin[:, points] < chance)
        taken = index[:, points].where(hit, none).amin(1)  # siblings are numbered in the order in which they were drawn
        self.owed[:, points] = 0  # where none was accepted; of other rows it is not asked again
        return taken.where(taken < none, 0)

    def _reject(self, j: int, where: Tensor, total: Tensor) -> None:
        """Take the law of child j off what is owed, `total` [batch] in all, in the rows `where` [batch] bool."""
        growth = torch.where(where, total * self.units[:, j], 0)
        scale = self.scale + growth
        owed = (self.owed - total[:, None] * self.shares[:, j]).clamp_(min=0)
        owed[:, j] = 0
        rest_total = self.rest_total if all_false_cheaply(growth > 0) else self._rest(scale).sum(1)
        # nothing left over: all of it was accepted up to rounding, and it stays owed
        where = where & (rest_total + owed.sum(1) > 0)
        self.owed = torch.where(where[:, None], owed, self.owed)
        self.scale = torch.where(where, scale, self.scale)
        self.rest_total = torch.where(where, rest_total, self.rest_total)

    def _rest(self, scale: Tensor) -> Tensor:
        """[batch, vocab]: owed off the siblings at a `scale` [batch]."""
        if self.weights is None:
            return self.rest
        return torch.addcmul(self.rest, self.weights, scale[:, None], value=-1).clamp_(min=0)

    def pick(self, coin: Tensor) -> Tensor:
        """Tokens [batch] int64 drawn from what is owed."""
        return inverse_cdf(self._rest(self.scale).scatter_add(1, self.tokens, self.owed), coin)


def _unit(weight: Tensor) -> Tensor:
    """What weights are divided by whose last draw's W is `weight`: 1, or if that is little the least power of two above it, by
    which division does not round.
    """
    return torch.where(weight < _LITTLE, weight / weight.frexp().mantissa, 1)


def _from_here_on(values: Tensor) -> Tensor:
    """Sums of each of the values [batch, width] and those after it."""
    return values.flip(1).cumsum(1).flip(1)
