"""Block verification: a whole chain is verified at once, from its last token backwards.

Sun et al., arXiv:2403.10444, algorithm 2; no valid rule accepts more tokens of one path in expectation. The paper flips
all coins and keeps the longest prefix that comes up; testing from the last token backwards is the same.

Why it is lossless: let reach(i) = min(1, reach(i-1) p(x_i) / q(x_i)), reach(0) = 1. A chain that ends at token i accepts
it with probability reach(i) and then emits from the target's law p after it. Draw one token x more, from q:

- x is accepted with mass min(reach p(x), q(x)), and the target's own law follows it. With S = sum (reach p - q)+, the mass
  of all acceptances is reach - S.
- In the other 1 - reach + S cases the coin of token i is flipped. It comes up with probability S / (S + 1 - reach) and
  emits from (reach p - q)+ / S: mass (reach p - q)+.

The two add up to reach p, token by token, which is what the chain without x emits here. Tokens before i have their turn with
probability 1 - reach in both cases. So drawing one token more or less, for reasons known before it is drawn, does not change
the law of the text, and a chain without drafted tokens samples from the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.coins import Coins, Purpose, RowCoins, inverse_cdf
from specdec.rules.base import Decision, Decisions, Rule
from specdec.rules.children import Siblings
from specdec.rules.residual import residual, residual_batch
from specdec.target_law import RowLaw, TargetLaw
from specdec.tree import DraftTree, RowTree, TreeSpec


@dataclass(frozen=True)
class BlockVerification(Rule):
    """Accept the longest prefix of a chain whose coin comes up; chains only, under any draft law."""

    lossless = True

    def check(self, spec: TreeSpec) -> None:
        if spec.width > 1:
            raise ValueError(
                f"BlockVerification verifies chains, and this tree gives a node up to {spec.width} children: use "
                "TraversalVerification, the same rule for trees, or draft a Chain."
            )

    def decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        path, reach, owed = [0], 1, []  # owed: for each node above the last, the chance to emit there and the law
        while reach > 0 and tree.children(path[-1]):  # what follows an impossible token may have no law
            p = target_law.probs(path[-1])
            ((child, q),) = tree.draws(path[-1], len(p))
            owed.append(residual(reach, p, q))
            reach = min(1, reach * p[tree.tokens[child]] / q[tree.tokens[child]])
            path.append(child)
        if coins.accept(path[-1], reach):
            return Decision(path, coins.pick(path[-1], target_law.probs(path[-1])))
        while True:  # ends at the root at the latest: there, 1 - reach is 0
            path.pop()
            reach, p = owed.pop()
            if coins.accept(path[-1], reach):
                return Decision(path, coins.pick(path[-1], p))

    def decide_batch(self, tree: DraftTree, target_law: TargetLaw, coins: Coins) -> Decisions:
        node = torch.zeros_like(tree.tokens[:, :1])  # [batch, 1] int64: the node at the current depth, or the last one
        length, accepted, path = node, node, [node]
        coin = coins.uniforms(Purpose.ACCEPT)
        p = owed = target_law.at(node[:, 0])  # [batch, vocab]; owed: the law to emit from, if no later coin comes up
        reach = p.new_ones(len(p), 1)
        for depth in range(tree.topology.depth):
            siblings = Siblings(tree, node[:, 0], p.dtype)
            more = siblings.exists[:, :1] & (reach > 0)
            if depth > 0:
                p = _law_where(target_law, more, node)
            child = siblings.child(torch.zeros_like(node))
            chance, rest = residual_batch(reach, p, child.excess(reach * p))
            heads = more & (coin.gather(1, node) < chance)
            owed, accepted = torch.where(heads, rest, owed), torch.where(heads, depth, accepted)
            reach = torch.where(more, child.ratio(reach * p), reach)
            node, length = torch.where(more, siblings.index[:, :1], node), length + more
            path.append(node)
        whole = coin.gather(1, node) < reach
        owed = torch.where(whole, _law_where(target_law, whole, node), owed)
        accepted = torch.where(whole, length, accepted)
        path = torch.cat(path, 1)
        emit = coins.uniforms(Purpose.EMIT).gather(1, path.gather(1, accepted))
        return Decisions(path, accepted[:, 0], inverse_cdf(owed, emit[:, 0]))


def _law_where(target_law: TargetLaw, needed: Tensor, node: Tensor) -> Tensor:
    """[batch, vocab]: the law at `node` [batch, 1] where it is needed; elsewhere that at the root, which is always valid."""
    return target_law.at(torch.where(needed, node, 0)[:, 0])
