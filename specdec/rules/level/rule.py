"""Level verification: a tree is verified depth by depth, from its deepest nodes to its root.

New here; experiments/results/verification_optimum.md compares it. On a chain it is block verification (Sun et al.,
arXiv:2403.10444); for independent paths see Thomas and Pal, arXiv:2602.16961.

Let T_d be the tokens down to depth d. Each node at depth d has a flow f: the chance, given T_d, that the text accepts this
node. It is a function of T_d and of the laws above depth d; at the root it is 1, and over one depth the flows add up to at
most 1. A node owes the mass f p(x) to its next token x. Its children take some of it as their flows:

    try the children of the whole depth one after the other. In the state in which all tries so far have failed, w is what
    the child's parent still owes, given that state, and l the law of the child's token, given that state, T_d and
    possibly other tokens drawn: any mass m <= min(l, w) may be taken, by a try that succeeds with probability m(x)/l(x).
    After a try that fails, l is (l - m) and w is (w - m), both normalised by the chance 1 - sum m to fail.

The flow of a child is the chance that the first success is its own. The mass still owed after the last try is emitted at the
node itself. Then the nodes of the deepest level are accepted with their flows. If none is, the nodes one depth above are
accepted with the mass they owe, given that all their children failed; and so on up to the root.

Why it is lossless: given T_d, the flows of the next depth and the mass owed after the last try add up to f p(x) for each node
and token, by the construction of each try. Given T_d, all tries fail as often as no node below depth d is accepted, as each
child is accepted with its flow (by induction from the deepest level upwards). That is when the nodes at depth d have their
turn. So a text that accepts a node goes on with p: f p(x) is accepted in a child or emitted. The root accepts with
probability 1. Which m is taken only changes the length. Whether a node exists must not depend on tokens of its own depth or
below, as the laws l are those of tokens that were drawn whatever their siblings and cousins were.

Sibling rejection and traversal take m = min(l, w): the first child gets most of the flow, and the others hardly any. Here the
children of a depth are tried together, `rounds` times over, and each is offered an even share of the mass owed, so that flows
are even. Siblings drawn without replacement are tried in pairs, first all firsts and then all seconds; the law of each is
that given the failures of the other, not its token.

Children that are tried together are still tried one after the other, but what each may take is fixed beforehand. Let F be the
chance that all tries before these fail, F w the mass owed, s a child's share of it, F_i the chance of reaching its try and
B >= F_i any bound. Then m_i = min(l_i, s F w / B) takes F_i m_i <= s F w, and the shares of one parent's children add up to at
most 1. B is F at first. The masses m_i then say how often earlier tries succeed at least, which gives a better B, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, product
from operator import mul
from typing import Any

import numpy as np
from torch import Tensor

from specdec.checks import as_int, put
from specdec.coins import Coins, Purpose, RowCoins
from specdec.laws import excludes_elders, is_random
from specdec.rules.base import Decision, Decisions, Rule
from specdec.rules.level.batch import BOUNDS, Levels
from specdec.target_law import RowLaw, TargetLaw
from specdec.tree import DraftTree, RowTree, TreeSpec


@dataclass(frozen=True)
class LevelVerification(Rule):
    """Accept the deepest node that the target's mass can reach, looking at all nodes of a depth together.

    Args:
        rounds: how often the children of a depth are tried, each time for an even share of the mass owed.
    """

    lossless = True

    rounds: int = 2

    def __post_init__(self) -> None:
        put(self, rounds=as_int("rounds", self.rounds, 1, cure="every child has to be tried at least once"))

    def check(self, spec: TreeSpec) -> None:
        if spec.width > 1 and not spec.by_depth:
            raise ValueError(
                "LevelVerification is lossless if no node's existence depends on tokens of its own depth or below, which "
                "these trees do not promise: set TreeSpec(by_depth=True) if it is so, or use TraversalVerification."
            )

    def decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        levels = [_Level({0: 1})]
        while below := levels[-1].descend(tree, target_law, self.rounds):
            levels.append(_Level(below))
        for level in reversed(levels):
            left = 1  # chance that none of the nodes so far is accepted
            for node, owed in sorted(level.owed.items()):
                chance = owed.sum() / level.failed if owed.sum() > 0 and level.failed > 0 else 0
                if node == 0 or (left > 0 and coins.accept(node, chance / left)):
                    law = owed if node in level.inner and owed.sum() > 0 else target_law.probs(node)
                    return Decision(_path(tree, node), coins.pick(node, law))
                left -= chance
        raise AssertionError("the root is accepted when nothing else is")

    def decide_batch(self, tree: DraftTree, target_law: TargetLaw, coins: Coins) -> Decisions:
        state = Levels(tree, target_law, self.rounds)
        node = state.accepted(coins.uniforms(Purpose.ACCEPT))
        return Decisions.ending_at(node, state.law(node, target_law), tree.topology, coins)

    def flows(self, tree: DraftTree, target_law: TargetLaw) -> Tensor:
        """[batch, node]: the chance of each node to be accepted, given the tokens down to its depth.

        Without the root's, the flows add up to the expected number of accepted drafted tokens.
        """
        return Levels(tree, target_law, self.rounds).flow


@dataclass
class _Level:
    """The nodes of one depth, with their flows."""

    flow: dict[int, Any]
    owed: dict[int, np.ndarray] = field(init=False)  # mass owed: [vocab] if children were tried, else [1], the total
    inner: set[int] = field(default_factory=set)
    failed: Any = 1  # chance that all tries so far fail, averaged over the children's tokens
    unmet: Any = 1  # chance that all tries so far fail, given the children's tokens

    def descend(self, tree: RowTree, target_law: RowLaw, rounds: int) -> dict[int, Any]:
        """Try the children, and return their flows."""
        self.inner = {v for v, flow in self.flow.items() if flow > 0 and tree.children(v)}
        self.owed = {
            v: flow * target_law.probs(v) if v in self.inner else np.array([flow], dtype=object)
            for v, flow in self.flow.items()
        }
        groups = [group for v in self.inner for group in _groups(tree, v, target_law.vocab)]
        flows = {child: 0 for v in self.flow for child in tree.children(v)}
        phases = 1 + max((group.phase for group in groups), default=0)
        for phase, left, second in product(range(phases), range(rounds, 0, -1), (False, True)):
            tries = [t for group in groups if group.phase == phase for t in group.tries(left, rounds, second)]
            self._try(sorted(tries, key=lambda t: (-self.flow[t.group.parent], t.child)), tree.tokens, flows)
        return flows

    def _try(self, tries: list[_Try], tokens: list[int], flows: dict[int, Any]) -> None:
        reached = [self.failed] * len(tries)  # upper bound on the chance of reaching each try
        for _ in range(BOUNDS):
            takes = [t.offered(self.owed[t.group.parent], bound) for t, bound in zip(tries, reached, strict=True)]
            chances = accumulate((1 - take.sum() for take in takes), mul, initial=self.failed)
            *reached, after = chances
        for t, take, chance in zip(tries, takes, reached, strict=True):
            x, parent = tokens[t.child], t.group.parent
            hit = take[x] / t.law[x] if t.law[x] > 0 else 0
            flows[t.child] += self.unmet * hit
            self.unmet *= 1 - hit
            rest = self.owed[parent] - take * chance
            self.owed[parent] = np.where(rest > 0, rest, 0 * rest)  # negative by rounding only
            t.group.fail(t.slot, _ratio(take, t.law))
        self.failed = after


@dataclass
class _Try:
    """One child's turn."""

    child: int
    group: _Group
    slot: int
    law: np.ndarray  # [vocab]: the law of the child's token, given all failures so far
    share: Any  # the share of the mass its parent owes that it is offered: a number, or [vocab]

    def offered(self, owed: np.ndarray, bound: Any) -> np.ndarray:
        return np.minimum(self.law, owed * self.share / bound) if bound > 0 else 0 * self.law


@dataclass
class _Group:
    """Siblings that share the mass owed: independent ones, or a pair whose second excludes the first, or points."""

    phase: int
    parent: int
    drawn: bool  # False for points
    pair: bool
    children: list[int]
    laws: list[np.ndarray]  # [vocab] for each child: the law of its token, before any try
    kept: list[np.ndarray] = field(init=False)  # [vocab] for each child: the chance that a token has failed so far

    def __post_init__(self) -> None:
        self.kept = [np.ones_like(law) for law in self.laws]

    def tries(self, left: int, rounds: int, second: bool) -> list[_Try]:
        """The tries of this turn.

        Args:
            left: rounds to go, this one included.
            rounds: all rounds.
            second: whether it is the turn of the second child of each pair.
        """
        if self.pair:
            laws = self._pair()
            # at the turn of the second child, the first has had its try of this round
            lefts = left - second, left
            share = _ratio(laws[second], laws[0] * lefts[0] + laws[1] * lefts[1])
            return [_Try(self.children[second], self, int(second), laws[second], share)]
        if second or not (self.drawn or left == rounds):
            return []
        one = type(self.laws[0][0])(1)
        # Points differ, so that each may take all that is owed to its token.
        share = one / (left * len(self.laws)) if self.drawn else one
        laws = [_normalised(law * kept) for law, kept in zip(self.laws, self.kept, strict=True)]
        return [_Try(child, self, slot, laws[slot], share) for slot, child in enumerate(self.children)]

    def _pair(self) -> tuple[np.ndarray, np.ndarray]:
        after = _others(law := self.laws[0])  # [vocab]: the mass left for the second child, by the first's token
        first, second = law * self.kept[0], law * self.kept[1]
        return _normalised(_ratio(first, after) * _others(second)), _normalised(second * _others(_ratio(first, after)))

    def fail(self, slot: int, hit: np.ndarray) -> None:
        self.kept[slot] = self.kept[slot] * (1 - hit)


def _groups(tree: RowTree, node: int, vocab: int) -> list[_Group]:
    """The children of a node, in the order in which they are tried."""
    draws, law = list(tree.draws(node, vocab)), tree.laws[node]
    count, pairs = sum(is_random(law, slot) for slot in range(len(draws))), excludes_elders(law)
    size = 2 if pairs else max(count, 1)
    parts = [(True, draws[start : min(start + size, count)]) for start in range(0, count, size)]
    points = [(False, draws[count:])] if count < len(draws) else []
    return [
        _Group(phase, node, drawn, drawn and pairs and len(part) == 2, [i for i, _ in part], [q for _, q in part])
        for phase, (drawn, part) in enumerate(parts + points)
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


def _path(tree: RowTree, node: int) -> list[int]:
    path = [node]
    while path[-1] > 0:
        path.append(tree.parents[path[-1]])
    return path[::-1]
