"""The certificate fails on bugs that shipped elsewhere, each planted in a rule, a drafter or the loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from specdec import DraftTree, Law, Sampling, Topology, TreeSpec
from specdec.coins import Purpose
from specdec.drafters import Drafter
from specdec.generate import Decoding
from specdec.rules import Decision, Rule
from specdec.rules.sibling import _residual
from specdec.sampling import TargetLaw
from specdec.testing import Table, TabularDrafter, TabularTarget, exact_law, target_law
from specdec.trees import Chain, Dynamic, Widths

PROMPT = (0, 1, 0)
BIASED = 1e-3  # a certificate of an exact rule reads 0; the smallest of these bugs moves the law by 1e-2
DRAFT = Table(3, seed=1)
TREES = {
    "chain": Chain(2),
    "iid": Widths((2, 1), Law.IID),
    "without_replacement": Widths((2, 1), Law.WITHOUT_REPLACEMENT),
    "dynamic": Dynamic(5, 2, 2),
}


def distance(drafter, rule=None, merge=True, **options):
    """Total variation of what the loop generates from the target's own law."""
    options = {"sampling": Sampling(1.0), **options}
    target = TabularTarget(3, seed=0)
    law = exact_law(target, PROMPT, drafter, rule=rule, merge=merge, **options)
    return float(law.total_variation(target_law(target, PROMPT, **options)))


class Sequential(Rule):
    """Sibling rejection with its parts exposed, so that each can be broken by itself."""

    lossless = True

    def test(self, coins, child, p, q):
        return coins.accept(child, p / q)

    def owed(self, p, q, tree, node):
        return _residual(p, q)

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


RULES = {
    "no_residual-without_replacement": (NoResidual(), "without_replacement", {}),
    "no_residual-chain": (NoResidual(), "chain", {}),
    "without_temperature": (WithoutTemperature(), "chain", {"sampling": Sampling(0.7)}),
    "fresh_sample_per_candidate": (FreshSamplePerCandidate(), "iid", {}),
    "point_taken_for_sampled": (PointTakenForSampled(), "dynamic", {}),
    "residual_of_the_whole_law": (ResidualOfTheWholeLaw(), "without_replacement", {}),
    "shared_noise": (SharedNoise(), "chain", {}),
    "parents_bonus": (ParentsBonus(), "chain", {}),
    "skips_duplicates": (SkipsDuplicates(), "iid", {}),
}


@pytest.mark.parametrize("tree", TREES)
def test_the_rule_that_is_broken_below_is_exact_before(tree):
    assert distance(TabularDrafter(DRAFT, TREES[tree]), Sequential()) == 0


@pytest.mark.parametrize("mutant", RULES)
def test_the_certificate_catches_a_planted_rule_bug(mutant):
    rule, tree, options = RULES[mutant]
    assert distance(TabularDrafter(DRAFT, TREES[tree]), rule, **options) > BIASED


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
        return TreeSpec(frozenset(Law), nodes=3, depth=2, width=1)

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


DRAFTERS = {
    "drops_unlikely": (DropsUnlikely(DRAFT, Chain(1)), True),
    "argmax_with_softmax": (ArgmaxWithSoftmax(DRAFT, Chain(1)), True),
    "top_taken_for_iid": (TopTakenForIid(DRAFT, Widths((2,), Law.IID)), True),
    "point_dropped_by_its_descendant": (DropsPointByDescendant(), True),
    "one_noise_for_all_steps": (OneNoiseForAllSteps(Table(3, seed=2), Chain(1)), False),
}


@pytest.mark.parametrize("mutant", DRAFTERS)
def test_the_certificate_catches_a_planted_drafter_bug(mutant):
    drafter, merge = DRAFTERS[mutant]
    assert distance(drafter, merge=merge) > BIASED


def test_the_certificate_catches_text_that_runs_on_after_a_stop_token(monkeypatch):
    accept = Decoding._accept

    def deaf_to_drafted_stops(self, tree, law, decisions):
        found, self.stop_tokens = self.stop_tokens, self.stop_tokens[:0]
        acceptance = accept(self, tree, law, decisions)
        self.stop_tokens = found
        return acceptance

    options = {"stop_tokens": (2,)}
    assert distance(TabularDrafter(DRAFT, Chain(2)), **options) == 0
    monkeypatch.setattr(Decoding, "_accept", deaf_to_drafted_stops)
    assert distance(TabularDrafter(DRAFT, Chain(2)), **options) > BIASED


def test_the_certificate_catches_processors_computed_once_per_block(monkeypatch):
    processed = TargetLaw._processed

    def without_the_path(self, row, node):
        logits = self._logits
        self._logits = logits[:, node : node + 1].expand_as(logits)
        scores = processed(self, row, 0)  # the text ends at the root
        self._logits = logits
        return scores

    options = {"sampling": Sampling(1.0, processors=(RepetitionPenaltyLogitsProcessor(1.5),))}
    assert distance(TabularDrafter(DRAFT, Chain(2)), **options) == 0
    monkeypatch.setattr(TargetLaw, "_processed", without_the_path)
    assert distance(TabularDrafter(DRAFT, Chain(2)), **options) > BIASED
