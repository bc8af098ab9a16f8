"""Level verification: a tree is verified depth by depth, from its deepest nodes to its root.

New here; experiments/results/verification_optimum.md compares it. On a chain it is block verification (Sun et al.,
arXiv:2403.10444); for independent paths see Thomas and Pal, arXiv:2602.16961.

Let T_d be the tokens down to depth d. Each node at depth d has a flow f, a function of T_d and of the laws above depth d:
the chance, given T_d, that the text accepts this node; at the root it is 1, and over one depth the flows add up to at most
1. A node owes the mass f p(x) to its next token x. Its children take some of it, and become the flows of the next depth:

    try the children of the whole depth one after the other. In the state in which all tries so far have failed, w is what
    the child's parent still owes, given that state, and l the law of the child's token, given that state, T_d and
    possibly other tokens drawn: any mass m <= min(l, w) may be taken, by a try that succeeds with probability m(x)/l(x).
    After a try that fails, l is (l - m) and w is (w - m), both normalised by the chance 1 - sum m to fail.

The flow of a child is the chance of the first success to be one of its own. Whatever is still owed after the last try is
emitted at the node itself. Then the nodes of the deepest level are accepted with their flows; if none is, the nodes one
depth above with what they owe, given that all their children failed; and so on up to the root.

Why it is lossless: given T_d, the flows of the next depth and what is owed after the last try add up to f p(x) for each node
and token, by the construction of each try. Given T_d, all tries fail as often as no node below depth d is accepted (for a
child is accepted with its flow, which is so by induction from the deepest level upwards), and that is when the nodes at
depth d have their turn. So a text that accepts a node goes on with p: f p(x) is accepted in a child or emitted. The root
accepts with probability 1. Which m is taken only changes the length. The shape of the tree may depend on its tokens, depth
by depth: whether a node is there must not depend on tokens deeper than itself.

Sibling rejection and traversal take m = min(l, w), so that the first child gets most of the flow and the others are hardly
looked into. Here each child is tried `rounds` times and takes its share of what is owed, so that flows are even; siblings
drawn without replacement are tried in pairs, the law of each being that given the failures of the other, not its token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.coins import Coins, Purpose, RowCoins
from specdec.rules.draft_law import Siblings
from specdec.rules.rule import Decision, Decisions, Rule
from specdec.rules.top_down import nobody
from specdec.sampling import RowLaw, TargetLaw
from specdec.tree import DraftTree, Law, RowTree, TreeSpec


class LevelVerification(Rule):
    """Accept the deepest node to which the target's mass can be led, looking at all nodes of a depth together."""

    lossless = True

    def __init__(self, rounds: int = 2):
        if rounds < 1:
            raise ValueError(f"rounds={rounds}: every child has to be tried at least once.")
        self.rounds = rounds

    def check(self, spec: TreeSpec) -> None:
        if spec.width > 1 and not spec.by_depth:
            raise ValueError(
                "LevelVerification is lossless where no node's existence depends on tokens below its depth, which these trees "
                "do not promise: set TreeSpec(by_depth=True) if it is so, or use TraversalVerification."
            )

    def decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        levels = [_Level({0: 1})]
        while below := levels[-1].descend(tree, target_law, self.rounds):
            levels.append(_Level(below))
        for level in reversed(levels):
            left = 1  # chance that none of the nodes so far is accepted
            for node, owed in level.owed.items():
                chance = owed.sum() / level.failed if owed.sum() > 0 and level.failed > 0 else 0
                if node == 0 or (left > 0 and coins.accept(node, chance / left)):
                    law = owed if node in level.inner and owed.sum() > 0 else target_law.probs(node)
                    return Decision(_path(tree, node), coins.pick(node, law))
                left -= chance
        raise AssertionError("the root is accepted when nothing else is")

    def decide_batch(self, tree: DraftTree, target_law: TargetLaw, coins: Coins) -> Decisions:
        state = self._descend(tree, target_law)
        node = state.accepted(coins.uniforms(Purpose.ACCEPT))
        owed = state.owed[state.rows, node[:, 0]]
        ready = state.inner.gather(1, node) & (owed.sum(1, keepdim=True) > 0)
        law = target_law.at(torch.where(ready, 0, node)[:, 0])
        return Decisions.ending_at(node, torch.where(ready, owed, law), tree.topology, coins)

    def flows(self, tree: DraftTree, target_law: TargetLaw) -> Tensor:
        """[batch, node]: the chance of each node to be accepted, given the tokens down to its depth.

        Without the root's they add up to the number of drafted tokens that is expected to be accepted.
        """
        return self._descend(tree, target_law).flow

    def _descend(self, tree: DraftTree, target_law: TargetLaw) -> _State:
        state = _State(tree, target_law, self.rounds)
        for _ in range(self.rounds * (tree.tokens.shape[1] - 1)):
            child, live = state.next()
            if nobody(live):
                break
            state.attempt(child, live[:, None])
        return state


@dataclass
class _Level:
    """The nodes of one depth, with their flows."""

    flow: dict[int, Any]
    owed: dict[int, np.ndarray] = field(init=False)  # by next token where children were tried, else in one sum
    inner: set[int] = field(default_factory=set)
    failed: Any = 1  # chance that all tries fail, over the children's tokens

    def descend(self, tree: RowTree, target_law: RowLaw, rounds: int) -> dict[int, Any]:
        """Try the children; their flows."""
        self.inner = {v for v, flow in self.flow.items() if flow > 0 and tree.children(v)}
        self.owed = {
            v: flow * target_law.probs(v) if v in self.inner else np.array([flow], dtype=object)
            for v, flow in self.flow.items()
        }
        tries = [t for v in self.inner for group in _groups(tree, v, target_law.vocab) for t in group.tries(rounds)]
        flows = {child: 0 for v in self.flow for child in tree.children(v)}
        unmet = 1  # chance that all tries so far fail, given the children's tokens
        for _, parent, child, group, slot in sorted(tries, key=lambda t: (t[0], -self.flow[t[1]], t[2])):
            if not self.failed > 0:
                break
            law, share = group.turn(slot)
            take = np.minimum(law, self.owed[parent] / self.failed * share)
            x = tree.tokens[child]
            hit = take[x] / law[x] if law[x] > 0 else 0
            flows[child] += unmet * hit
            unmet *= 1 - hit
            rest = self.owed[parent] - take * self.failed
            self.owed[parent] = np.where(rest > 0, rest, 0 * rest)  # negative by rounding only
            self.failed *= 1 - take.sum()
            group.fail(slot, _ratio(take, law))
        return flows


@dataclass
class _Group:
    """Siblings that take turns: independent ones, a pair drawn without replacement, or deterministic ones."""

    phase: int
    parent: int
    law: Law
    children: list[int]
    laws: list[np.ndarray]  # of each child's token, at first
    kept: list[np.ndarray] = field(init=False)  # [vocab] for each child: chance of a token to have failed so far
    left: list[int] = field(init=False)  # tries of each child

    def tries(self, rounds: int) -> list[tuple]:
        rounds = 1 if self.law == Law.POINT else rounds  # one try takes all that is owed to the token
        self.kept, self.left = [np.ones_like(law) for law in self.laws], [rounds] * len(self.laws)
        slots = list(enumerate(self.children))
        return [((self.phase, r), self.parent, child, self, slot) for r in range(rounds) for slot, child in slots]

    def turn(self, slot: int) -> tuple[np.ndarray, Any]:
        """The law of a child's token [vocab], given all failures so far, and its share of what is owed to each token.

        The share is this try's part of all that can be taken from now on.
        """
        law = self.laws[slot]
        if self.law != Law.WITHOUT_REPLACEMENT or len(self.laws) < 2:
            left = sum(self.left) if self.law == Law.IID else self.left[slot]
            return _normalised(law * self.kept[slot]), type(law[0])(1) / left
        after = _others(law := self.laws[0])  # what is left for the second child
        first, second = law * self.kept[0], law * self.kept[1]
        laws = _normalised(_ratio(first, after) * _others(second)), _normalised(second * _others(_ratio(first, after)))
        return laws[slot], _ratio(laws[slot], laws[0] * self.left[0] + laws[1] * self.left[1])

    def fail(self, slot: int, hit: np.ndarray) -> None:
        self.kept[slot] = self.kept[slot] * (1 - hit)
        self.left[slot] -= 1


class _State:
    """Where every row stands: the numbers of `_Level` and `_Group` for all nodes, [batch, node] or [batch, depth]."""

    def __init__(self, tree: DraftTree, target_law: TargetLaw, rounds: int):
        self.tree, self.target_law = tree, target_law
        self.rows = torch.arange(len(tree.tokens), device=tree.tokens.device)
        root = target_law.at(torch.zeros_like(self.rows))  # [batch, vocab]
        shape, topology = tree.tokens.shape, tree.topology
        self.index = torch.arange(shape[1], device=root.device)
        self.exists = tree.laws != Law.PADDING
        self.parents, self.depths = topology.parents.clamp(min=0), topology.depths
        siblings = topology.parents[:, :, None] == topology.parents[:, None]
        elder = siblings & (self.index < self.index[:, None])
        self.slot = elder.sum(-1)  # among all siblings, padding too
        rank = (elder & self.exists[:, None]).sum(-1)  # among those that exist
        law = tree.laws.gather(1, self.parents)
        point = (law == Law.POINT) | ((law == Law.SAMPLED_THEN_TOP) & (rank > 0))
        again = ((law == Law.WITHOUT_REPLACEMENT) | (law == Law.SAMPLED_THEN_TOP)).long()
        self.phase = again * torch.where(law == Law.SAMPLED_THEN_TOP, rank.clamp(max=1), rank // 2)
        without = (law == Law.WITHOUT_REPLACEMENT)[..., None]
        mates = siblings & without & self.exists[:, None] & ((rank ^ 1)[..., None] == rank[:, None])
        self.paired, self.mate = mates.any(-1), mates.long().argmax(-1)
        self.second = rank % 2 == 1
        # [batch, node, node]: the second's tries count when what is owed is shared out to the first
        self.shares = torch.where((law == Law.IID)[..., None], siblings, self.index == self.index[:, None]).to(
            root.dtype
        )
        self.left = torch.where(point, 1, rounds) * self.exists
        self.left[:, 0] = 0
        self.done = torch.zeros_like(self.left)
        self.rounds, self.width = rounds, shape[1]
        self.inner = torch.zeros_like(self.exists)
        self.flow = root.new_zeros(shape)
        self.flow[:, 0] = 1
        self.unmet, self.failed = (root.new_ones(shape[0], topology.depth + 1) for _ in range(2))
        self.owed, self.kept = root.new_zeros(*shape, root.shape[1]), root.new_ones(*shape, root.shape[1])

    def next(self) -> tuple[Tensor, Tensor]:
        """[batch] int64, [batch] bool: the child to be tried next, and whether there is one."""
        flow, failed = self.flow.gather(1, self.parents), self.failed.gather(1, (self.depths - 1).clamp(min=0))
        waiting = (self.left > 0) & (flow > 0) & (failed > 0)
        turn = (self.depths * self.width + self.phase) * self.rounds + self.done
        first = turn.masked_fill(~waiting, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        flow = torch.where(waiting & (turn == first), flow, 0)
        return (flow == flow.amax(1, keepdim=True)).long().argmax(1), waiting.any(1)

    def attempt(self, child: Tensor, live: Tensor) -> None:
        """Try one child [batch] of the rows in which one is `live` [batch, 1]."""
        rows, own = self.rows, child[:, None]
        parent = self.parents[rows, child]
        depth = self.depths[rows, parent][:, None]
        new = live & ~self.inner[rows, parent][:, None]
        start = self.flow[rows, parent][:, None] * self.target_law.at(torch.where(new[:, 0], parent, 0))
        owed = torch.where(new, start, self.owed[rows, parent])
        failed, unmet = self.failed.gather(1, depth), self.unmet.gather(1, depth)
        law, share = self._turn(own, parent)
        take = torch.minimum(law, owed / failed.where(failed > 0, 1) * share) * live
        hit = _divide(take, law)
        met = hit.gather(1, self.tree.tokens.gather(1, own))
        self.inner[rows, parent] |= live[:, 0]
        self.flow.scatter_add_(1, own, unmet * met)
        self.unmet.scatter_(1, depth, unmet * (1 - met))
        self.owed[rows, parent] = (owed - take * failed).clamp(min=0)
        self.failed.scatter_(1, depth, failed * (1 - take.sum(1, keepdim=True)))
        self.kept[rows, child] *= 1 - hit
        self.left.scatter_add_(1, own, -live.long())
        self.done.scatter_add_(1, own, live.long())

    def _turn(self, own: Tensor, parent: Tensor) -> tuple[Tensor, Tensor]:
        """`_Group.turn` for one child of every row."""
        rows, siblings = self.rows, Siblings(self.tree, parent)
        kept = self.kept[rows, own[:, 0]]
        left = (self.shares[rows, own[:, 0]] * self.left).sum(1, keepdim=True).clamp(min=1)
        law = _scaled(siblings.child(self.slot.gather(1, own)).dense(kept) * kept)
        paired = self.paired.gather(1, own)
        if self.width < 3 or nobody(paired[:, 0]):
            return law, 1 / left
        mate = self.mate.gather(1, own)
        second = self.second.gather(1, own)
        first = torch.where(second, mate, own)
        one = siblings.child(self.slot.gather(1, first)).dense(kept)
        after, other = _all_others(one), self.kept[rows, mate[:, 0]]
        a, b = one * torch.where(second, other, kept), one * torch.where(second, kept, other)
        a_law, b_law = _scaled(_divide(a, after) * _all_others(b)), _scaled(b * _all_others(_divide(a, after)))
        mine, others = torch.where(second, b_law, a_law), torch.where(second, a_law, b_law)
        lefts = self.left.gather(1, own), self.left.gather(1, mate)
        share = _divide(mine, mine * lefts[0] + others * lefts[1])
        return torch.where(paired, mine, law), torch.where(paired, share, 1 / left)

    def accepted(self, coin: Tensor) -> Tensor:
        """[batch, 1]: the first node whose coin comes up, the deepest nodes first."""
        failed = self.failed.gather(1, self.depths)
        mass = torch.where(self.inner, self.owed.sum(-1), self.flow) * self.exists
        chance = _divide(mass, failed)
        elder = (self.depths[:, :, None] == self.depths[:, None]) & (self.index < self.index[:, None])
        left = 1 - (elder.to(chance.dtype) @ chance[..., None])[..., 0]
        heads = (left > 0) & (coin[:, : self.width] < _divide(chance, left)) & self.exists
        heads[:, 0] = True
        order = self.depths * self.width + self.width - 1 - self.index
        return torch.where(heads, order, -1).argmax(1, keepdim=True)


def _groups(tree: RowTree, node: int, vocab: int) -> list[_Group]:
    """The children of a node, in the order in which they are tried."""
    draws, law = list(tree.draws(node, vocab)), Law(tree.laws[node])
    if law == Law.WITHOUT_REPLACEMENT:
        parts = [(law, draws[start : start + 2]) for start in range(0, len(draws), 2)]
    elif law == Law.SAMPLED_THEN_TOP:
        parts = [(law, draws[:1]), (Law.POINT, draws[1:])]
    else:
        parts = [(law, draws)]
    return [
        _Group(phase, node, kind, [child for child, _ in part], [q for _, q in part])
        for phase, (kind, part) in enumerate(parts)
    ]


def _others(weights: np.ndarray) -> np.ndarray:
    """For each entry the sum of all others, without cancellation."""
    top = weights.argmax()
    rest = weights.copy()
    rest[top] = 0
    total = rest.sum()
    others = (total - rest) + weights[top]
    others[top] = total
    return others


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b > 0, a / np.where(b > 0, b, 1), 0)


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / total if (total := weights.sum()) > 0 else weights


def _all_others(weights: Tensor) -> Tensor:
    """`_others` for each row of [batch, vocab]."""
    top = weights.argmax(1, keepdim=True)
    rest = weights.scatter(1, top, 0)
    total = rest.sum(1, keepdim=True)
    return (total - rest + weights.gather(1, top)).scatter(1, top, total)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def _scaled(weights: Tensor) -> Tensor:
    return _divide(weights, weights.sum(1, keepdim=True))


def _path(tree: RowTree, node: int) -> list[int]:
    path = [node]
    while path[-1] > 0:
        path.append(tree.parents[path[-1]])
    return path[::-1]
