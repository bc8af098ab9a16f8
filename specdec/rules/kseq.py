"""K-SEQ: independent children, all tested against the same share of the target's law.

The k-sequential selection of SpecTr (Sun et al., arXiv:2310.15141), at every node of a tree.

Why it is lossless: a child x ~ q is accepted with mass m(x) = min(q(x), p(x) / rho); let beta = sum m. Children are
independent, and how many there are does not depend on their tokens. So of k children the accepted one is x with mass
m(x) c, where c = 1 + (1 - beta) + ... + (1 - beta)^(k-1). When all are rejected, the law emitted is p - m c, normalised.
Together that is p, provided that p - m c is nowhere negative. m c <= p c / rho everywhere, so c <= rho suffices. As rho
grows, rho beta grows and c beta = 1 - (1 - beta)^k falls. So there is a smallest rho that suffices, the most generous to
drafts, and every larger one suffices too; k does, for c <= k. Children below are verified against the law after their
parent, whatever it was.

rho is a multiple of 1 / 2**16, rounded up: acceptance is lower by less than that fraction, and p / rho is exact
in any arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.coins import Coins, Purpose, RowCoins, inverse_cdf
from specdec.laws import Law
from specdec.rules.base import Decision, Decisions, Rule
from specdec.rules.children import ChildLaw, Siblings
from specdec.target_law import RowLaw, TargetLaw
from specdec.tree import DraftTree, RowTree, TreeSpec
from specdec_kernels.reference.early_exit import all_false_cheaply

_GRID = 2**16
_MARGIN = 1e-12  # above the rounding of the sums by which a rho is tested


@dataclass(frozen=True)
class KSeq(Rule):
    """Accept a child with probability min(1, p / (rho q)), one after the other; IID children, or single ones."""

    lossless = top_down = True

    def check(self, spec: TreeSpec) -> None:
        if spec.width > 1 and not spec.laws <= {Law.IID}:  # one child alone is independent, whatever its law
            names = ", ".join(sorted(law.name for law in spec.laws))
            raise ValueError(
                f"KSeq needs children drawn independently, and these trees have {names} children: draft "
                "Widths(..., law=Law.IID) at a temperature above 0, or use SiblingRejection, which takes every law."
            )
        if spec.width > 1 and not spec.by_depth:
            raise ValueError(
                "KSeq is lossless if the number of a node's children does not depend on their tokens, which these trees do not "
                "promise: set TreeSpec(by_depth=True) if it is so, or use SiblingRejection, which takes every tree."
            )

    def decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        path = [0]
        while True:
            p = target_law.probs(path[-1])
            draws = list(tree.draws(path[-1], len(p)))
            if not draws:
                return Decision(path, coins.pick(path[-1], p))
            q, count = draws[0][1], len(draws)
            share = p * _GRID / _rho(p.astype(np.float64), q.astype(np.float64), count)
            ratios = ((child, share[tree.tokens[child]] / q[tree.tokens[child]]) for child, _ in draws)
            accepted = next((child for child, ratio in ratios if coins.accept(child, ratio)), None)
            if accepted is None:
                return Decision(path, coins.pick(path[-1], _rest(p, np.minimum(share, q), count)))
            path.append(accepted)

    def decide_batch(self, tree: DraftTree, target_law: TargetLaw, coins: Coins) -> Decisions:
        rows = torch.arange(len(tree.tokens), device=tree.tokens.device)
        # [batch] int64: the deepest accepted node, and how many were accepted
        node, accepted = torch.zeros_like(rows), torch.zeros_like(rows)
        alive, coin = torch.ones_like(rows, dtype=torch.bool), coins.uniforms(Purpose.ACCEPT)
        # owed: [batch, vocab]: the law still owed at `node`
        owed, path = target_law.at(node), [node]
        for _ in range(tree.topology.depth):
            siblings = Siblings(tree, node, owed.dtype)
            child, rest = _try_children(siblings, owed, coin.gather(1, siblings.index), alive)
            alive = child > 0
            if all_false_cheaply(alive):
                owed = rest
                break
            node = torch.where(alive, child, node)
            owed = torch.where(alive[:, None], target_law.at(node), rest)
            accepted = accepted + alive
            path.append(node)
        return Decisions(torch.stack(path, 1), accepted, inverse_cdf(owed, coins.uniforms(Purpose.EMIT)[rows, node]))


def _rest(p: np.ndarray, taken: np.ndarray, count: int) -> np.ndarray:
    """[vocab], not normalised: the law owed when `count` children were rejected, each accepted with mass `taken` [vocab]."""
    rest = np.maximum(p - taken * sum((1 - taken.sum()) ** i for i in range(count)), 0)
    return rest if rest.sum() > 0 else p


def _rho(p: np.ndarray, q: np.ndarray, count: int) -> int:
    """The smallest rho that suffices for `count` children, in units of 1 / _GRID."""
    low, high = _GRID, count * _GRID
    while low < high:
        middle = (low + high) // 2
        beta = np.minimum(p * _GRID / middle, q).sum()
        if middle / _GRID * beta + (1 - beta) ** count >= 1 + _MARGIN:
            high = middle
        else:
            low = middle + 1
    return high


def _try_children(siblings: Siblings, p: Tensor, coin: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Try the children of one node in the rows `alive` [batch] bool; p: [batch, vocab], coin: [batch, width].

    Returns:
        The accepted child [batch] int64, 0 where there is none, and the law [batch, vocab] owed where there is none.
    """
    width = siblings.index.shape[1]
    count = siblings.exists.sum(1, keepdim=True).clamp(min=1)  # [batch, 1]
    child = siblings.child(torch.zeros_like(count))  # all children have the law of the first
    share = p * _GRID / _rho_batch(p, child, count, width)
    hit = siblings.exists & alive[:, None] & (coin < child.ratio(share, siblings.tokens))
    first = hit & (hit.cumsum(1) == 1)
    taken = child.overlap(share)
    miss = 1 - taken.sum(1, keepdim=True)
    factor = torch.stack([(miss**i).where(i < count, 0) for i in range(width)]).sum(0)
    rest = (p - taken * factor).clamp(min=0)
    tried = siblings.exists.any(1, keepdim=True) & alive[:, None] & (rest.sum(1, keepdim=True) > 0)
    return torch.where(first, siblings.index, 0).sum(1), torch.where(tried, rest, p)


def _rho_batch(p: Tensor, child: ChildLaw, count: Tensor, width: int) -> Tensor:
    """`_rho` for every row: [batch, 1] int64, by as many halvings as the widest row may need."""
    low, high = torch.full_like(count, _GRID), count * _GRID
    for _ in range(((width - 1) * _GRID).bit_length()):
        middle = (low + high) // 2
        beta = child.overlap(p * _GRID / middle).sum(1, keepdim=True, dtype=torch.float64)
        enough = middle.double() / _GRID * beta + (1 - beta) ** count >= 1 + _MARGIN
        low, high = torch.where(enough, low, torch.minimum(middle + 1, high)), torch.where(enough, middle, high)
    return high
