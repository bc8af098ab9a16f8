"""Sibling rejection: one rule for every draft law.

With one sampled child it is speculative sampling (Leviathan et al., arXiv:2211.17192, algorithm 1; Chen et al.,
arXiv:2302.01318), with IID children SpecInfer's multi-step verification (arXiv:2305.09781, algorithm 2), without
replacement Sequoia's (arXiv:2402.12374, algorithm 2), with POINT children the sampling of EAGLE-2 (arXiv:2406.16858).

Why it is lossless: let r be the law still owed at a node (at first the target's own) and l the law a child was drawn
from given what was drawn before. The child is accepted with mass min(r, l) and the rest, (r - l)+ normalised, is what
is still owed given the rejection; so whatever the children were, the emitted token has law r. Induct over the children
and then down the tree: a child's subtree is verified against the target's law after that child.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.coins import Coins, Purpose, RowCoins, inverse_cdf
from specdec.rules.draft_law import Siblings
from specdec.rules.residual import residual, residual_batch
from specdec.rules.rule import Decision, Decisions, Rule
from specdec.sampling import RowLaw, TargetLaw
from specdec.tree import DraftTree, RowTree


class SiblingRejection(Rule):
    """Try the children in the order they were drawn, each against what the target law still owes."""

    lossless = True

    def decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        path = [0]
        while True:
            p = target_law.probs(path[-1])
            for child, q in tree.draws(path[-1], len(p)):
                x = tree.tokens[child]
                if coins.accept(child, p[x] / q[x]):
                    path.append(child)
                    break
                p = _residual(p, q)
            else:
                return Decision(path, coins.pick(path[-1], p))

    def decide_batch(self, tree: DraftTree, target_law: TargetLaw, coins: Coins) -> Decisions:
        rows = torch.arange(len(tree.tokens), device=tree.tokens.device)
        node = torch.zeros_like(rows)  # [batch] int64: the deepest accepted node
        accepted, alive = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
        coin = coins.uniforms(Purpose.ACCEPT)
        owed, path = target_law.at(node), [node]  # owed: [batch, vocab], what the target law still owes at `node`
        for _ in range(tree.topology.depth):
            child, rest = _try_children(Siblings(tree, node), owed, coin, alive)
            alive = child > 0
            node = torch.where(alive, child, node)
            owed = torch.where(alive[:, None], target_law.at(node), rest)
            accepted = accepted + alive
            path.append(node)
        emit = coins.uniforms(Purpose.EMIT)[rows, node]
        return Decisions(torch.stack(path, 1), accepted, inverse_cdf(owed, emit))


def _residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return residual(1, p, q)[1]


def _try_children(siblings: Siblings, owed: Tensor, coin: Tensor, alive: Tensor):
    """The accepted child of each row (0: none) [batch] and the law owed after its rejected siblings [batch, vocab]."""
    coins = coin.gather(1, siblings.index)
    taken = torch.zeros_like(siblings.index[:, 0])
    for j in range(siblings.index.shape[1]):
        child = siblings.child(torch.full_like(taken, j)[:, None])
        trying = siblings.exists[:, j] & alive & (taken == 0)
        hit = trying & (coins[:, j] < (owed.gather(1, child.token) / child.probability)[:, 0])
        taken = torch.where(hit, siblings.index[:, j], taken)
        _, rest = residual_batch(owed.new_ones(1), owed, child.excess(owed))
        owed = torch.where((trying & ~hit)[:, None], rest, owed)
    return taken, owed
