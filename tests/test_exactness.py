"""Certificates: the real loop is exact for every combination, and the certificate fails on planted bugs."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RepetitionPenaltyLogitsProcessor

from specdec import Law, Sampling
from specdec.coins import Purpose
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.rules import Decision, SiblingRejection
from specdec.rules.sibling import _residual
from specdec.testing import Table, TabularDrafter, TabularTarget, assert_lossless, exact_law, target_law
from specdec.trees import Chain, Dynamic, Widths

PROMPT = (0, 1, 0)
LLAMA_TV = 1e-12  # float64 logits of one text differ by 1e-15 between batch shapes
TREES = {
    "chain": Chain(2),
    "iid": Widths((2, 1), Law.IID),
    "without_replacement": Widths((2, 1), Law.WITHOUT_REPLACEMENT),
    "sampled_then_top": Widths((2, 1), Law.SAMPLED_THEN_TOP),
    "dynamic": Dynamic(5, 2, 2),
}
SAMPLINGS = {
    "temperature_0.7": Sampling(0.7),
    "temperature_1": Sampling(1.0),
    "top_k": Sampling(1.0, top_k=2),
    "top_p": Sampling(1.0, top_p=0.8),
    "repetition_penalty": Sampling(1.0, processors=(RepetitionPenaltyLogitsProcessor(1.5),)),
    "greedy": Sampling(),
}


def drafter_of(tree: str):
    return NgramDrafter(2) if tree == "ngram" else TabularDrafter(Table(3, seed=1), TREES[tree])


def distance(drafter, rule=None, target=None, **options):
    target = target or TabularTarget(3, seed=0)
    merge = options.pop("merge", True)
    law = exact_law(target, PROMPT, drafter, rule=rule, merge=merge, **options)
    assert sum(law.probabilities.values()) == 1
    return float(law.total_variation(target_law(target, PROMPT, **options)))


@pytest.mark.parametrize("stop", [(), (2,)], ids=["no_eos", "eos"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("tree", [*TREES, "ngram"])
def test_sibling_rejection_is_exactly_lossless(tree, sampling, stop):
    assert distance(drafter_of(tree), sampling=SAMPLINGS[sampling], stop_tokens=stop) == 0


@pytest.mark.parametrize("tree", [*TREES, "ngram"])
def test_whole_runs_followed_without_merging_are_exact(tree):
    target = TabularTarget(2, seed=0)
    drafter = NgramDrafter(2) if tree == "ngram" else TabularDrafter(Table(2, seed=1), TREES[tree])
    assert distance(drafter, target=target, merge=False, max_new_tokens=3) == 0


def llama(seed: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
                         max_position_embeddings=32, bos_token_id=0, eos_token_id=3)  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for p in model.parameters():
        p.data *= 4 if p.dim() > 1 else 1
    return model


@pytest.mark.parametrize("tree", ["chain", "iid", "sampled_then_top", "dynamic"])
def test_llamas_with_the_real_cache_are_lossless(tree):
    target, draft = llama(0, 2), llama(1, 1)
    options = {"sampling": Sampling(1.0), "max_new_tokens": 3, "stop_tokens": (3,)}
    law = exact_law(target, PROMPT, ModelDrafter(draft, TREES[tree]), **options)
    assert float(law.total_variation(target_law(target, PROMPT, **options))) <= LLAMA_TV


def test_a_llama_pair_followed_over_several_steps_is_lossless():
    target, draft = llama(0, 2), llama(1, 1)
    options = {"sampling": Sampling(1.0, top_k=2), "max_new_tokens": 4}
    law = exact_law(target, PROMPT, ModelDrafter(draft, Chain(1)), merge=False, **options)
    assert float(law.total_variation(target_law(target, PROMPT, **options))) <= LLAMA_TV


def test_a_rule_is_certified_in_one_line():
    assert_lossless(SiblingRejection())


class NoResidual(SiblingRejection):
    """Siblings are tested against the original law, and that is what is emitted."""

    def decide(self, tree, target_law, coins):
        path = [0]
        while True:
            p = target_law.probs(path[-1])
            for child, q in tree.draws(path[-1], len(p)):
                if coins.accept(child, min(1, p[tree.tokens[child]] / q[tree.tokens[child]])):
                    path.append(child)
                    break
            else:
                return Decision(path, coins.pick(path[-1], p))


class PointTakenForSampled(SiblingRejection):
    """Every child is treated as if it had been drawn uniformly."""

    def decide(self, tree, target_law, coins):
        path = [0]
        while True:
            p = target_law.probs(path[-1])
            for child, _ in tree.draws(path[-1], len(p)):
                q = coins.law(np.ones(len(p)))
                if coins.accept(child, min(1, p[tree.tokens[child]] / q[tree.tokens[child]])):
                    path.append(child)
                    break
                p = _residual(p, q)
            else:
                return Decision(path, coins.pick(path[-1], p))


class SharedNoise(SiblingRejection):
    """The recovered token is drawn with the coin that drew the draft."""

    def decide(self, tree, target_law, coins):
        p = target_law.probs(0)
        for child, q in tree.draws(0, len(p)):
            if coins.accept(child, min(1, p[tree.tokens[child]] / q[tree.tokens[child]])):
                return Decision([0, child], coins.pick(child, target_law.probs(child)))
            return Decision([0], coins.pick(child, _residual(p, q), Purpose.DRAFT))
        return Decision([0], coins.pick(0, p))


class ParentResidual(SiblingRejection):
    """The bonus token after an accepted child is drawn from the parent's law."""

    def decide(self, tree, target_law, coins):
        decision = super().decide(tree, target_law, coins)
        if len(decision.path) < 2:
            return decision
        node = decision.path[-1]
        return Decision(decision.path, coins.pick(node + 100, target_law.probs(decision.path[-2])))


class SkipsDuplicates(SiblingRejection):
    """IID siblings that repeat an earlier one are skipped."""

    def decide(self, tree, target_law, coins):
        p, seen = target_law.probs(0), set()
        for child, q in tree.draws(0, len(p)):
            x = tree.tokens[child]
            if x in seen:
                p[x] = 0
                p = p / p.sum() if p.sum() > 0 else target_law.probs(0)
                continue
            seen.add(x)
            if coins.accept(child, min(1, p[x] / q[x])):
                return Decision([0, child], coins.pick(child, target_law.probs(child)))
            p = _residual(p, q)
        return Decision([0], coins.pick(0, p))


@pytest.mark.parametrize(
    ("rule", "tree"),
    [(NoResidual(), "without_replacement"), (NoResidual(), "chain"), (PointTakenForSampled(), "dynamic"),
     (SharedNoise(), "chain"), (ParentResidual(), "chain"), (SkipsDuplicates(), "iid")],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)  # fmt: skip
def test_the_certificate_catches_planted_rule_bugs(rule, tree):
    assert distance(drafter_of(tree), rule) > 1e-3


class DropsUnlikely(TabularDrafter):
    """Samples, then drops the drawn token when it is improbable (a prune by the outcome)."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        if tree.draft_probs is None:
            return tree
        probs = tree.draft_probs[:, :1].gather(2, tree.tokens[:, 1:2, None])[..., 0]
        tree.laws[:, 1:] = torch.where(probs < 0.5, Law.PADDING, tree.laws[:, 1:])
        return tree


class ArgmaxWithSoftmax(TabularDrafter):
    """Drafts the most probable token and claims that it was sampled."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        if tree.draft_probs is None:
            return tree
        tree.tokens[:, 1] = tree.draft_probs[:, 0].argmax(-1)
        return tree


@pytest.mark.parametrize("mutant", [DropsUnlikely, ArgmaxWithSoftmax])
def test_the_certificate_catches_planted_drafter_bugs(mutant):
    assert distance(mutant(Table(3, seed=1), Chain(1))) > 1e-3


def test_the_certificate_catches_a_temperature_left_out():
    target, drafter = TabularTarget(3, seed=0), drafter_of("chain")
    law = exact_law(target, PROMPT, drafter, sampling=Sampling(1.0))
    assert law.total_variation(target_law(target, PROMPT, sampling=Sampling(0.7))) > 1e-2
