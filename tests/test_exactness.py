"""Certificates: the real loop is exact for every combination, and the certificate fails on planted bugs."""

import pytest
from transformers import RepetitionPenaltyLogitsProcessor

from certificates.cases import PROMPT, llama
from specdec import Law, Sampling
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.rules import SiblingRejection
from specdec.testing import Table, TabularDrafter, TabularTarget, assert_lossless, exact_law, target_law
from specdec.trees import Chain, Dynamic, Widths

LLAMA_TV = 1e-12  # float64 logits of one text differ by 1e-15 between batch shapes
TREES = {
    "chain": Chain(2),
    "iid": Widths((2, 1), Law.IID),
    "without_replacement": Widths((2, 1), Law.WITHOUT_REPLACEMENT),
    "sampled_then_top": Widths((2, 1), Law.SAMPLED_THEN_TOP),
    "dynamic": Dynamic(5, 2, 2),
    "threshold": Dynamic(5, 2, 2, threshold=0.3),
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
