"""Planted in the rule: sibling rejection with one part broken."""

from __future__ import annotations

import numpy as np

from certificates.cases import Case
from certificates.mutants.mutant import DRAFT, STOP, TREES, Mutant
from specdec import Sampling
from specdec.coins import Purpose
from specdec.rules import Decision, Rule
from specdec.rules.residual import residual
from specdec.testing import TabularDrafter


class Sequential(Rule):
    """Sibling rejection with its parts exposed, so that each can be broken by itself."""

    lossless = True

    def test(self, coins, child, p, q):
        return coins.accept(child, p / q)

    def owed(self, p, q, tree, node):
        return residual(1, p, q)[1]

    def emit(self, coins, path, p, target_law):
        return coins.pick(path[-1], p)

    def draws(self, tree, node, vocab):
        return tree.draws(node, vocab)

    def decide(self, tree, target_law, coins):
        path = [0]
        while True:
            p = target_law.probs(path[-1])
            for child, q in self.draws(tree, path[-1], len(p)):
                x = tree.tokens[child]
                if self.test(coins, child, p[x], q[x]):
                    path.append(child)
                    break
                p = self.owed(p, q, tree, path[-1])
            else:
                return Decision(path, self.emit(coins, path, p, target_law))


class NoResidual(Sequential):
    """Siblings are tested against the original law, and that is what is emitted."""

    def owed(self, p, q, tree, node):
        return p


class WithoutTemperature(Sequential):
    """The emitted token is sampled at temperature 1 while the law has temperature 0.7."""

    def emit(self, coins, path, p, target_law):
        return coins.pick(path[-1], coins.normalise(p.astype(np.float64) ** 0.7))


class FreshSamplePerCandidate(Sequential):
    """Each child is compared with a sample of its own; mismatches are thrown away."""

    def decide(self, tree, target_law, coins):
        p = target_law.probs(0)
        for child, _ in tree.draws(0, len(p)):
            if coins.pick(child, p, Purpose.ACCEPT) == tree.tokens[child]:
                return Decision([0, child], coins.pick(child, target_law.probs(child)))
        return Decision([0], coins.pick(0, p))


class PointTakenForSampled(Sequential):
    """Deterministic children are treated as if they had been drawn uniformly."""

    def draws(self, tree, node, vocab):
        for child, q in tree.draws(node, vocab):
            yield child, q * 0 + q.sum() / vocab


class ResidualOfTheWholeLaw(Sequential):
    """After a rejection without replacement the next child is taken for a draw from the whole draft law."""

    def draws(self, tree, node, vocab):
        laws = list(tree.draws(node, vocab))
        for child, _ in laws:
            yield child, laws[0][1]

    def test(self, coins, child, p, q):
        return q > 0 and coins.accept(child, p / q)


class SharedNoise(Sequential):
    """The recovered token is drawn with the coin that drew the draft."""

    def emit(self, coins, path, p, target_law):
        return coins.pick(1, p, Purpose.DRAFT) if len(path) == 1 else coins.pick(path[-1], p)


class ParentsBonus(Sequential):
    """The bonus token after an accepted child is drawn from the parent's law."""

    def emit(self, coins, path, p, target_law):
        return coins.pick(path[-1], target_law.probs(path[-2]) if len(path) > 1 else p)


class SkipsDuplicates(Sequential):
    """IID siblings that repeat an earlier one are not tested again, and nothing is subtracted for them."""

    def draws(self, tree, node, vocab):
        seen = set()
        for child, q in tree.draws(node, vocab):
            if tree.tokens[child] not in seen:
                seen.add(tree.tokens[child])
                yield child, q


class RefusesDraftedStops(Sequential):
    """A drafted stop token is never accepted, and nothing makes up for it where the law ends in it."""

    def decide(self, tree, target_law, coins):
        decision = super().decide(tree, target_law, coins)
        stop = next((i for i, node in enumerate(decision.path) if i and tree.tokens[node] == STOP), None)
        if stop is None:
            return decision
        path = decision.path[:stop]
        return Decision(path, coins.pick(path[-1], target_law.probs(path[-1])))


_RULES = {
    "siblings tested against the original law": (NoResidual(), "without_replacement", {}),
    "no residual: the target's law emitted after a rejection": (NoResidual(), "chain", {}),
    "emitted token without the temperature": (WithoutTemperature(), "chain", {"sampling": Sampling(0.7)}),
    "a fresh target sample per candidate": (FreshSamplePerCandidate(), "iid", {"horizon": 2}),
    "deterministic children taken for sampled ones": (PointTakenForSampled(), "dynamic", {}),
    "residual of the whole law without replacement": (ResidualOfTheWholeLaw(), "without_replacement", {}),
    "draft noise shared with the recovered token": (SharedNoise(), "chain", {}),
    "bonus token from the parent's law": (ParentsBonus(), "chain", {}),
    "IID duplicates skipped": (SkipsDuplicates(), "iid", {}),
    "law of the stop token's step changed": (RefusesDraftedStops(), "chain", {"stop_tokens": (STOP,)}),
}
BROKEN_RULES = [
    Mutant(name, Case(TabularDrafter(DRAFT, TREES[tree]), rule, **options))
    for name, (rule, tree, options) in _RULES.items()
]
