"""Traversal verification: a tree is verified from its leaves to its root, each node when all its children have failed.

Weng et al., arXiv:2505.12398. Deviation: each child's own law stands in place of the draft law, so that every draft law may
be used; for independent children that is the paper's rule. On a chain it is block verification.

Why it is lossless: every node is entered with a chance `reach` and the target's law p after it. Let x be the token drawn
last: a leaf, and the last child of its parent. Let reach and p be those at the parent after x's siblings failed. Without x
the traversal stops at the parent with probability reach and emits from p. With x, drawn from q, and S = sum (reach p - q)+:

- it stops at x with mass min(reach p(x), q(x)), and the target's law follows;
- it fails at x with probability 1 - reach + S, and then stops at the parent with probability S / (S + 1 - reach), emitting
  from (reach p - q)+ / S.

The two add up to reach p, token by token, and the rest of the tree has its turn with probability 1 - reach in both cases. So
the text has the same law with and without x, given all other tokens. Take the tokens away one by one, the last drawn first:
the root is left, which samples from the target.

What happens at a node depends on the rest of the tree only through whether its turn comes. Reach and residuals can
therefore be computed from the root downwards, parents first, all coins flipped, and the first node of the traversal
whose coin comes up is the one accepted: that is the fast path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.coins import Coins, Purpose, RowCoins
from specdec.laws import Law
from specdec.rules.base import Decision, Decisions, Rule
from specdec.rules.children import Siblings
from specdec.rules.residual import residual, residual_batch
from specdec.target_law import RowLaw, TargetLaw
from specdec.tree import DraftTree, RowTree


@dataclass(frozen=True)
class TraversalVerification(Rule):
    """Accept the first node, children before their parents, whose coin comes up; any tree, any draft law."""

    lossless = True

    def decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        def visit(path: list[int], reach) -> Decision | None:
            if reach == 0:  # what follows an impossible token may have no law
                return None
            if not tree.children(path[-1]):  # a leaf: its law is needed only when it is accepted
                accepted = coins.accept(path[-1], reach)
                return Decision(path, coins.pick(path[-1], target_law.probs(path[-1]))) if accepted else None
            p = target_law.probs(path[-1])
            for child, q in tree.draws(path[-1], len(p)):
                x = tree.tokens[child]
                if decision := visit([*path, child], min(1, reach * p[x] / q[x])):
                    return decision
                reach, p = residual(reach, p, q)
            return Decision(path, coins.pick(path[-1], p)) if coins.accept(path[-1], reach) else None

        decision = visit([0], 1)
        assert decision is not None, "the root's coin always comes up: there, 1 - reach is 0"
        return decision

    def decide_batch(self, tree: DraftTree, target_law: TargetLaw, coins: Coins) -> Decisions:
        walk, coin = _Walk(tree), coins.uniforms(Purpose.ACCEPT)
        rows = torch.arange(len(tree.tokens), device=tree.tokens.device)
        # [batch, vocab] each; owed: the law to emit from, if an inner node is accepted
        p = owed = target_law.at(torch.zeros_like(rows))
        reach = p.new_ones(len(p), 1)  # [batch, 1]: with p, what is owed at the parent of the current child
        entered = p.new_ones(tree.tokens.shape)  # [batch, node]: the chance with which each node is entered
        heads = torch.zeros_like(tree.tokens, dtype=torch.bool)  # [batch, node]: coins that came up
        heads[:, 0] = True
        for step in walk.steps:
            # Skip parents whose turn cannot come: their laws are not needed, and may be NaN.
            late = (heads & walk.before[rows, step.parent[:, 0]]).any(1, keepdim=True)
            live = step.exists & ~late & (entered.gather(1, step.parent) > 0)
            law = target_law.at(torch.where(live, step.parent, 0)[:, 0])
            p = torch.where(step.first, law, p)
            reach = torch.where(step.first, entered.gather(1, step.parent), reach)
            child = Siblings(tree, step.parent[:, 0], p.dtype).child(step.slot)
            chance = child.ratio(reach * p)
            entered = entered.scatter(1, step.child, torch.where(live, chance, 0))
            leaf = live & walk.leaf.gather(1, step.child) & (coin.gather(1, step.child) < chance)
            reach, p = residual_batch(reach, p, child.excess(reach * p))
            inner = live & step.last & (coin.gather(1, step.parent) < reach)
            owed = torch.where(inner, p, owed)
            heads = heads.scatter(1, step.child, leaf)
            heads = heads.scatter(1, step.parent, heads.gather(1, step.parent) | inner)
        node = walk.first(heads)
        is_leaf = walk.leaf.gather(1, node)
        owed = torch.where(is_leaf, target_law.at(torch.where(is_leaf, node, 0)[:, 0]), owed)
        return Decisions.ending_at(node, owed, tree.topology, coins)


class _Walk:
    """The order of the traversal in every row: nodes are entered in preorder and left in postorder."""

    def __init__(self, tree: DraftTree):
        topology, exists = tree.topology, tree.laws != Law.PADDING
        index = torch.arange(tree.tokens.shape[1], device=tree.tokens.device)
        parents, reach = topology.parents, topology.ancestors.float()
        siblings = parents[:, :, None] == parents[:, None, :]
        elder = siblings & (index < index[:, None])  # [batch, node, node]: the second is an elder sibling of the first
        # [batch, node, node] bool: whether the second node has its turn before the first is entered
        self.before = reach @ elder.float() @ reach.mT > 0
        # [batch, node, node] bool: whether the second node is a descendant of the first
        self.below = topology.ancestors.mT & (index != index[:, None])
        self.leaf = ~(self.below & exists[:, None]).any(-1)  # [batch, node]
        entered = self.before.sum(-1) + topology.depths  # [batch, node] int64: place in preorder
        place = entered.gather(1, parents.clamp(min=0)) * len(index) + index
        order = torch.where(exists, place, len(index) ** 2)[:, 1:].argsort(1) + 1  # siblings together, padding last
        parent = torch.where(exists, parents, -1).gather(1, order)  # [batch, node - 1], -1 where nothing exists
        turn = torch.nn.functional.pad(parent, (1, 1), value=-2).diff() != 0  # between two steps: the parent changes
        slots = torch.where(exists, elder.sum(-1), 0).gather(1, order)
        columns = (order, parent.clamp(min=0), slots, parent >= 0, turn[:, :-1], turn[:, 1:])
        self.steps = [_Step(*(column[:, k : k + 1] for column in columns)) for k in range(len(index) - 1)]

    def first(self, heads: Tensor) -> Tensor:
        """[batch, 1]: the first node of the traversal among those in `heads` [batch, node] bool."""
        late = (heads[:, None] & (self.before | self.below)).any(-1)
        return (heads & ~late).long().argmax(1, keepdim=True)


class _Step(NamedTuple):
    """One child of every row; all tensors are [batch, 1]."""

    child: Tensor
    parent: Tensor
    slot: Tensor  # the child's place among its siblings
    exists: Tensor
    first: Tensor  # whether it is the first child of its parent
    last: Tensor  # whether it is the last
