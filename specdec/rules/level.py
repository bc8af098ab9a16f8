"""Level verification: a tree is verified depth by depth, from its deepest nodes to its root.

New here. On a chain it is block verification (Sun et al., arXiv:2403.10444).

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

from specdec.coins import RowCoins
from specdec.rules.rule import Decision, Rule
from specdec.sampling import RowLaw
from specdec.tree import Law, RowTree


class LevelVerification(Rule):
    """Accept the deepest node to which the target's mass can be led, looking at all nodes of a depth together."""

    lossless = True

    def __init__(self, rounds: int = 4):
        if rounds < 1:
            raise ValueError(f"rounds={rounds}: every child has to be tried at least once.")
        self.rounds = rounds

    def decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        levels = [_Level({0: 1})]
        while below := levels[-1].descend(tree, target_law, self.rounds):
            levels.append(_Level(below))
        for level in reversed(levels):
            left = 1  # chance that none of the nodes so far is accepted
            for node, owed in level.owed.items():
                chance = owed.sum() / level.failed if level.failed > 0 else 0
                if node == 0 or (left > 0 and coins.accept(node, chance / left)):
                    law = owed if node in level.inner and owed.sum() > 0 else target_law.probs(node)
                    return Decision(_path(tree, node), coins.pick(node, law))
                left -= chance
        raise AssertionError("the root is accepted when nothing else is")


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
        self.owed = {v: f * target_law.probs(v) if v in self.inner else np.array([f]) for v, f in self.flow.items()}
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
            self.owed[parent] = np.maximum(self.owed[parent] - take * self.failed, 0)
            self.failed *= 1 - take.sum()
            group.fail(slot, _ratio(take, law))
        return flows


@dataclass
class _Group:
    """Siblings that take turns: independent ones, or a pair drawn without replacement."""

    phase: int
    parent: int
    children: list[int]
    laws: list[np.ndarray]
    pair: bool
    kept: list[np.ndarray] = field(init=False)  # [vocab] for each child: chance of a token to have failed so far
    left: list[int] = field(init=False)

    def tries(self, rounds: int) -> list[tuple]:
        rounds = 1 if all((law == 1).any() for law in self.laws) else rounds  # certain: one try takes all
        self.kept, self.left = [np.ones_like(law) for law in self.laws], [rounds] * len(self.laws)
        slots = list(enumerate(self.children))
        return [((self.phase, r), self.parent, child, self, slot) for r in range(rounds) for slot, child in slots]

    def turn(self, slot: int) -> tuple[np.ndarray, Any]:
        """The law of a child's token [vocab], given all failures so far, and its share of what is owed to each token.

        The share is this try's part of all that can be taken from now on.
        """
        law = self.laws[slot]
        if not self.pair:
            return _normalised(law * self.kept[slot]), type(law[0])(1) / sum(self.left)
        after = _others(law := self.laws[0])  # what is left for the second child
        first, second = law * self.kept[0], law * self.kept[1]
        laws = _normalised(_ratio(first, after) * _others(second)), _normalised(second * _others(_ratio(first, after)))
        return laws[slot], _ratio(laws[slot], laws[0] * self.left[0] + laws[1] * self.left[1])

    def fail(self, slot: int, hit: np.ndarray) -> None:
        self.kept[slot] = self.kept[slot] * (1 - hit)
        self.left[slot] -= 1


def _groups(tree: RowTree, node: int, vocab: int) -> list[_Group]:
    """The children of a node, in the order in which they are tried."""
    draws, law = list(tree.draws(node, vocab)), tree.laws[node]
    if law == Law.WITHOUT_REPLACEMENT:
        cuts = range(0, len(draws), 2)
    elif law == Law.SAMPLED_THEN_TOP:
        cuts = range(min(len(draws), 2))
    else:
        cuts = range(1)
    ends = [*cuts[1:], len(draws)]
    parts = [draws[start:end] for start, end in zip(cuts, ends, strict=True)]
    return [
        _Group(
            phase, node, [c for c, _ in part], [q for _, q in part], law == Law.WITHOUT_REPLACEMENT and len(part) == 2
        )
        for phase, part in enumerate(parts)
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
