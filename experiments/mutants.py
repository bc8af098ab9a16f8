"""Bugs that shipped elsewhere, each planted in a rule, a drafter or the loop: a certificate must fail on every one.

with mutant.planted():
    mutant.case.certify()["total_variation"]  # above 0
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from experiments.cases import ADAPTIVE, Case
from specdec import DraftTree, Law, Sampling, Topology, TreeSpec
from specdec.coins import Purpose
from specdec.decoding import Decoding
from specdec.drafters import Drafter
from specdec.rules import (
    BlockVerification,
    Decision,
    KSeq,
    LevelVerification,
    Rule,
    TraversalVerification,
    block,
    kseq,
    level,
    traversal,
)
from specdec.rules.residual import residual
from specdec.sampling import TargetLaw
from specdec.testing import Table, TabularDrafter, TabularTarget
from specdec.trees import Chain, Dynamic, Widths, adaptive

STOP = 2
DRAFT = Table(3, seed=1)
TREES = {
    "chain": Chain(2),
    "iid": Widths((2, 1), Law.IID),
    "without_replacement": Widths((2, 1), Law.WITHOUT_REPLACEMENT),
    "dynamic": Dynamic(5, 2, 2),
}


@dataclass(frozen=True, eq=False)
class Mutant:
    """One planted bug, and a case in which it shows."""

    name: str
    case: Case
    patches: tuple[
        tuple[Any, str, Any], ...
    ] = ()  # (owner, attribute, wrong value), where the library itself is changed

    @contextmanager
    def planted(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, attribute, wrong in self.patches:
                stack.enter_context(patch.object(owner, attribute, wrong, create=True))
            yield


# --- in the rule: sibling rejection with one part broken


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
        return coins.pick(path[-1], coins.law(p.astype(np.float64) ** 0.7))


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


RULES = {
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


# --- in the drafter: what it says is not how it drew


class DropsUnlikely(TabularDrafter):
    """Samples, then drops the drawn token when it is improbable (a prune by the outcome)."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        if tree.draft_probs is None:
            return tree
        probs = tree.draft_probs[:, :1].gather(2, tree.tokens[:, 1:2, None])[..., 0]
        return replace(
            tree, laws=torch.cat([tree.laws[:, :1], torch.where(probs < 0.5, Law.PADDING, tree.laws[:, 1:])], 1)
        )


class ArgmaxWithSoftmax(TabularDrafter):
    """Drafts the most probable token and claims that it was sampled."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        if tree.draft_probs is not None:
            tree.tokens[:, 1] = tree.draft_probs[:, 0].argmax(-1)
        return tree


class TopTakenForIid(TabularDrafter):
    """Drafts the top two and claims that they were independent samples."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        if tree.draft_probs is not None:
            tree.tokens[:, 1:3] = tree.draft_probs[:, 0].topk(2).indices
        return tree


class OneNoiseForAllSteps(TabularDrafter):
    """Every step draws with the coins of the first."""

    def propose(self, context, coins):
        step, coins.step = coins.step, 0
        tree = super().propose(context, coins)
        coins.step = step
        return tree


class DropsPointByDescendant(Drafter):
    """Drafts a certain token and a sampled one below it, and drops both when the sample is not token 0."""

    def spec(self, sampling):
        return TreeSpec(frozenset({Law.POINT, Law.IID}), nodes=3, depth=2, width=1)

    def propose(self, context, coins):
        depth = min(2, context.max_depth)
        root, batch = context.root[:, None], len(context.tokens)
        if depth < 2:
            return DraftTree(root, Topology(torch.full((batch, 1), -1), 0), torch.zeros_like(root, dtype=torch.uint8))
        weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).expand(batch, 1, 3)
        drawn = coins.picks(range(2, 3), weights)
        tokens = torch.cat([root, torch.ones_like(root), drawn], 1)
        kept = torch.tensor([[Law.POINT, Law.IID, Law.POINT]], dtype=torch.uint8).expand(batch, -1)
        dropped = torch.tensor([[Law.POINT, Law.PADDING, Law.PADDING]], dtype=torch.uint8)
        laws = torch.where(drawn == 0, kept, dropped)
        topology = Topology(torch.tensor([[-1, 0, 1]]).expand(batch, -1), 2)
        return DraftTree(tokens, topology, laws, torch.cat([weights, weights], 1))


class OrderedByProbability(TabularDrafter):
    """Draws two tokens without replacement, then tries the more probable one first."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        if tree.draft_probs is not None:
            probs = tree.draft_probs[:, 0].gather(1, tree.tokens[:, 1:3])
            tree.tokens[:, 1:3] = tree.tokens[:, 1:3].gather(1, probs.argsort(1, descending=True))
        return tree


PAIRS = Widths((2,), Law.WITHOUT_REPLACEMENT)


def dropping_what_does_not_pay(self, drawn, expected):
    """`_Growing.add` that drops the drawn children whose probability is small."""
    exists = _add(self, drawn, expected)
    if drawn.draft_probs is not None:
        count = drawn.draft_probs.shape[1]
        exists &= (drawn.draft_probs.gather(-1, drawn.tokens.unflatten(1, (count, -1))) > 0.5).flatten(1).numpy()
    return exists


_add = adaptive._Growing.add
DRAFTERS = {
    "sampled, then pruned by the drawn token's probability": (DropsUnlikely(DRAFT, Chain(1)), True),
    "sampled, then ranked by the drawn tokens' probability": (OrderedByProbability(DRAFT, PAIRS), True),
    "argmax draft with a softmax law": (ArgmaxWithSoftmax(DRAFT, Chain(1)), True),
    "top-k draft taken for independent samples": (TopTakenForIid(DRAFT, Widths((2,), Law.IID)), True),
    "point node dropped by its sampled descendant": (DropsPointByDescendant(), True),
    "adaptive: drawn, then dropped as not worth its time": (
        TabularDrafter(DRAFT, ADAPTIVE),
        True,
        (adaptive._Growing, "add", dropping_what_does_not_pay),
    ),
    "one noise for all steps": (OneNoiseForAllSteps(Table(3, seed=2), Chain(1)), False),
}


# --- in the loop


_accept, _processed = Decoding._accept, TargetLaw._processed


def deaf_to_drafted_stops(self, tree, law, decisions):
    """`Decoding._accept` for which text runs on after a stop token."""
    found, self.stop_tokens = self.stop_tokens, self.stop_tokens[:0]
    acceptance = _accept(self, tree, law, decisions)
    self.stop_tokens = found
    return acceptance


def without_the_path(self, row, node):
    """`TargetLaw._processed` that shows the processors the text up to the root, whatever the node."""
    logits = self._logits
    self._logits = logits[:, node : node + 1].expand_as(logits)
    scores = _processed(self, row, 0)
    self._logits = logits
    return scores


PENALTY = Sampling(1.0, processors=(RepetitionPenaltyLogitsProcessor(1.5),))
LOOP = {
    "text runs on after a stop token": ({"stop_tokens": (STOP,)}, (Decoding, "_accept", deaf_to_drafted_stops)),
    "processors computed once per block": ({"sampling": PENALTY}, (TargetLaw, "_processed", without_the_path)),
}


# --- in a rule of the library: one function or formula of its module replaced


def without_weight(reach, p, q):
    """The residual of the target's whole law, where only `reach` of it is owed."""
    return residual(reach, p, q)[0], residual(1, p, q)[1]


def chance_renormalised(reach, p, q):
    """What is left over, taken as a fraction of 1 - reach."""
    total = np.maximum(reach * p - q, 0).sum()
    return (min(1, total / (1 - reach)) if reach < 1 else 1), residual(reach, p, q)[1]


def chance_kept(reach, p, q):
    return reach, residual(reach, p, q)[1]


def uncapped(one, ratio):
    """In place of min(1, ratio)."""
    return ratio


_rest = kseq._rest
_seen: dict[str, Any] = {}


def rho_of_two(p, q, count):
    """Enough for two children, and so exact with the right residual."""
    _seen["q"] = q
    return 2 * kseq._GRID


def rest_ignoring_rho(p, taken, count):
    return _rest(p, np.minimum(p, _seen["q"]), count)


def forgotten(group, slot, hit):
    """A try that fails, and says nothing about the child's token."""


_offered = level._Try.offered


def too_much(self, owed, bound):
    """Four times the mass that the bound on the chance of this try allows."""
    return _offered(self, 4 * owed, bound)


BLOCK, TRAVERSAL, KSEQ = BlockVerification(), TraversalVerification(), KSeq()
LEVEL = {name: LevelVerification(rounds) for name, rounds in (("independent", 2), ("pair", 1))}
MODULES = {
    "block: product of ratios uncapped": (BLOCK, (block, "min", uncapped)),
    "block: residual without weight": (BLOCK, (block, "residual", without_weight)),
    "block: chance kept": (BLOCK, (block, "residual", chance_kept)),
    "traversal: product of ratios uncapped": (TRAVERSAL, (traversal, "min", uncapped)),
    "traversal: residual without weight": (TRAVERSAL, (traversal, "residual", without_weight)),
    "traversal: chance renormalised": (TRAVERSAL, (traversal, "residual", chance_renormalised)),
    "kseq: rho is one": (KSEQ, (kseq, "_rho", lambda p, q, count: kseq._GRID)),
    "kseq: rho for one child more": (KSEQ, (kseq, "_rest", lambda p, taken, count: _rest(p, taken, count + 1))),
    "kseq: residual of one child": (KSEQ, (kseq, "_rest", lambda p, taken, count: _rest(p, taken, 1))),
    "kseq: residual ignores rho": (KSEQ, (kseq, "_rho", rho_of_two), (kseq, "_rest", rest_ignoring_rho)),
    "level: laws after failures not normalised": (LEVEL["pair"], (level, "_normalised", lambda weights: weights)),
    "level: pair drawn with replacement": (LEVEL["pair"], (level, "_others", lambda weights: 0 * weights + 1)),
    "level: failures forgotten": (LEVEL["independent"], (level._Group, "fail", forgotten)),
    "level: more offered than is owed": (LEVEL["independent"], (level._Try, "offered", too_much)),
}
_SHAPES = {
    BLOCK: Chain(3),
    TRAVERSAL: Widths((1, 2), Law.WITHOUT_REPLACEMENT),
    KSEQ: Widths((1, 2), Law.IID),
    LEVEL["pair"]: Widths((2, 1), Law.WITHOUT_REPLACEMENT),
    LEVEL["independent"]: Widths((2, 1), Law.IID),
}


class Constant(Table):
    """The same law after every text, without rounding: weights are powers of two."""

    def __init__(self, weights):
        super().__init__(len(weights))
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def logits(self, text):
        return self.weights.log()


class ConstantTarget(Constant, TabularTarget):
    pass


def _module_case(rule: Rule) -> Case:
    """A case on which all bugs of `rule` show; on many other tables some of them do not."""
    tree = _SHAPES[rule]
    depth = len(tree.widths)
    return Case(TabularDrafter(Table(3, seed=9), tree), rule, Sampling(0.7), TabularTarget(3, 8), horizon=depth + 1)


def example(rule: Rule) -> Case:
    """The example of block verification's paper: the target's law is (1/3, 2/3), the draft's (2/3, 1/3)."""
    return Case(TabularDrafter(Constant([2, 1]), Chain(2)), rule, target=ConstantTarget([1, 2]))


IN_RULES = [Mutant(name, _module_case(rule), tuple(patches)) for name, (rule, *patches) in MODULES.items()]
MUTANTS = [
    *(Mutant(name, Case(TabularDrafter(DRAFT, TREES[tree]), rule, **options))
      for name, (rule, tree, options) in RULES.items()),
    *(Mutant(name, Case(drafter, merge=merge), tuple(patches)) for name, (drafter, merge, *patches) in DRAFTERS.items()),
    *(Mutant(name, Case(TabularDrafter(DRAFT, Chain(2)), **options), (planted,))
      for name, (options, planted) in LOOP.items()),
    *IN_RULES,
    Mutant("block: uncapped, on the paper's example", example(BLOCK), ((block, "min", uncapped),)),
]  # fmt: skip
