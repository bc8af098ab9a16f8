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
from specdec.rules.rule import Decision, Decisions, Rule
from specdec.sampling import RowLaw, TargetLaw
from specdec.tree import DraftTree, Law, RowTree


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
            child, residual = _try_children(tree, node, rows, owed, coin, alive)
            alive = child > 0
            node = torch.where(alive, child, node)
            owed = torch.where(alive[:, None], target_law.at(node), residual)
            accepted = accepted + alive
            path.append(node)
        emit = coins.uniforms(Purpose.EMIT)[rows, node]
        return Decisions(torch.stack(path, 1), accepted, inverse_cdf(owed, emit))


def _residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    rest = np.maximum(p - q, 0)
    total = rest.sum()
    return rest / total if total > 0 else p  # all of p accepted up to rounding: the rejection was a rounding error


def _try_children(tree: DraftTree, node: Tensor, rows: Tensor, owed: Tensor, coin: Tensor, alive: Tensor):
    """The accepted child of each row's `node` (0: none) [batch] and the law owed after its rejected siblings."""
    children = tree.topology.children[rows, node]  # [batch, width]
    slots = children.clamp(min=0)
    exists = (children > 0) & (tree.laws.gather(1, slots) != Law.PADDING) & alive[:, None]
    tokens, coins = tree.tokens.gather(1, slots), coin.gather(1, slots)
    draft = None if tree.draft_probs is None else _DraftLaw(tree, node, rows, tokens, exists)
    taken = torch.zeros_like(node)
    for j in range(children.shape[1]):
        x = tokens[:, j : j + 1]
        trying = exists[:, j] & (taken == 0)
        p = owed.gather(1, x)[:, 0]
        q = 1.0 if draft is None else draft.probability(j, x)
        hit = trying & (coins[:, j] < p / q)
        taken = torch.where(hit, children[:, j], taken)
        missed = (trying & ~hit)[:, None]
        rest = owed.scatter(1, x, 0) if draft is None else draft.subtract(j, x, owed)
        total = rest.sum(1, keepdim=True)
        owed = torch.where(missed & (total > 0), rest / total, owed)
    return taken, owed


class _DraftLaw:
    """The draft law at one node of every row, as its children see it one after the other."""

    def __init__(self, tree: DraftTree, node: Tensor, rows: Tensor, tokens: Tensor, exists: Tensor):
        assert tree.draft_probs is not None
        law = tree.laws[rows, node]
        internal = node.clamp(max=tree.draft_probs.shape[1] - 1)  # leaves come last and have no children to try
        weights = tree.draft_probs[rows, internal]
        is_top = (law == Law.SAMPLED_THEN_TOP)[:, None] & exists
        is_top[:, 0] = False
        self.weights = _drop(weights, tokens, is_top)  # [batch, vocab]: what the next sampled child is drawn from
        self.is_point = is_top | (law == Law.POINT)[:, None]  # [batch, width]
        self.no_repeat = law == Law.WITHOUT_REPLACEMENT

    def probability(self, j: int, x: Tensor) -> Tensor:
        """[batch]: the law of child j at its own token."""
        self.law = self.weights / self.weights.sum(1, keepdim=True)
        return torch.where(self.is_point[:, j], 1.0, self.law.gather(1, x)[:, 0])

    def subtract(self, j: int, x: Tensor, owed: Tensor) -> Tensor:
        """(owed - law of child j)+ [batch, vocab]; later siblings are then drawn without it where the law says so."""
        self.weights = _drop(self.weights, x, self.no_repeat[:, None])
        return torch.where(self.is_point[:, j : j + 1], owed.scatter(1, x, 0), (owed - self.law).clamp(min=0))


def _drop(weights: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """`weights` [batch, vocab] with weight 0 at those `tokens` [batch, k] for which `where` [batch, k] holds."""
    kept = torch.ones_like(tokens, dtype=weights.dtype).masked_fill_(where, 0)
    return weights * torch.ones_like(weights).scatter_reduce_(1, tokens, kept, "amin")
