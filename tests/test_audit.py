"""The audit: false alarms as rare as stated, biases found in as many tokens as stated, on real models too."""

import os

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

import specdec
from experiments.studies.audit_calibration import (
    BETS,
    DEMO_BUGS,
    DEMO_TOKENS,
    PartOfTheResidual,
    _half,
    on_demo,
    on_tables,
)
from specdec import Sampling
from specdec.rules import SiblingRejection
from specdec.testing.audit import audit, detectable, model_log_probs


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: on a busy machine more threads take several times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LONG = "SPECDEC_LONG_AUDIT"  # in the environment: minutes


def test_an_exact_rule_raises_false_alarms_no_more_often_than_alpha():
    alarms = sum(not on_tables(SiblingRejection(), seed, alpha=0.2, max_tokens=1000).passed for seed in range(25))
    assert alarms <= 10  # 5 at most are expected; 11 of 25 at a rate of 0.2 come once in 180 times, and seeds are fixed


def test_the_bias_stated_as_detectable_is_found():
    found = sum(not _half(1000, detectable(1000, 0.01, BETS), seed, 0.01).passed for seed in range(40))
    assert found >= 30  # 36 expected; fewer than 30 of 40 at a rate of 0.9 come once in 300 times, and seeds are fixed


def test_more_tokens_show_smaller_biases():
    assert detectable(1000, 0.01, BETS) > detectable(4000, 0.01, BETS) > detectable(16000, 0.01, BETS) > 0.01


def test_the_draft_shows_missing_residuals_sooner():
    tokens = [on_tables(PartOfTheResidual(1.0), 0, max_tokens=6000, with_draft=draft).tokens for draft in (True, False)]
    assert tokens[0] < tokens[1]


def test_noise_used_again_shows_in_the_order_of_token_ids():
    """Both tokens of a text come from one uniform number: each has the right law, given none of the other."""
    log_probs = torch.full((2, 5), 0.2).log()

    def generate(seed):
        uniforms = torch.rand(100, 1, generator=torch.Generator().manual_seed(seed)).expand(-1, 2)
        return [(torch.tensor([0]), row) for row in (uniforms * 5).long()]

    found = audit(generate, lambda prompt, tokens: log_probs[: len(tokens)], max_tokens=400)
    assert not found.passed
    assert found.leading.startswith("serial")


def test_tokens_that_the_target_never_emits_are_counted_and_found():
    law = torch.tensor([0.5, 0.5, 0]).log().expand(2000, -1)
    drawn = torch.tensor([0.475, 0.475, 0.05])

    def generate(seed):
        return [(torch.tensor([0]), torch.multinomial(drawn, 500, True, generator=torch.Generator().manual_seed(seed)))]

    found = audit(generate, lambda prompt, tokens: law[: len(tokens)], max_tokens=4000)
    assert not found.passed
    assert found.impossible > 0


def test_bad_input_is_refused():
    text = [(torch.tensor([0]), torch.tensor([1, 1]))]
    with pytest.raises(ValueError, match="alpha=2"):
        audit(lambda seed: text, lambda prompt, tokens: torch.zeros(2, 3), alpha=2)
    with pytest.raises(ValueError, match=r"log_probs returned \[3\]"):
        audit(lambda seed: text, lambda prompt, tokens: torch.zeros(3))
    with pytest.raises(ValueError, match="returned no tokens"):
        audit(lambda seed: [], lambda prompt, tokens: torch.zeros(0, 3))


def test_processors_and_filters_are_part_of_the_law_that_is_audited():
    pair = specdec.demo.load()
    prompt = pair.tokenizer(pair.prompts[0].text, return_tensors="pt").input_ids[0, :24]
    sampling = Sampling(0.8, top_k=20, processors=(RepetitionPenaltyLogitsProcessor(1.3),))
    out = specdec.generate(pair.target, prompt, sampling=sampling, max_new_tokens=8)
    probs = model_log_probs(pair.target, sampling)(prompt, out.tokens[0]).exp()
    assert probs.shape == (len(out.tokens[0]), 4096)
    assert (probs > 0).sum(1).tolist() == [20] * len(probs)
    assert (probs.gather(1, out.tokens[0][:, None]) > 0).all()


def check(rule, least):
    found = on_demo(rule, max_tokens=DEMO_TOKENS[least])
    assert rule.bias >= least
    assert not found.passed, str(found)


@pytest.mark.slow
@pytest.mark.parametrize(("bug", "strength"), DEMO_BUGS[0.05], ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_bias_of_five_hundredths_per_step_is_found_on_the_demo_pair(bug, strength):
    check(bug(strength), 0.05)


def test_the_demo_pair_passes():
    found = on_demo(SiblingRejection(), max_tokens=2000)
    assert found.passed, str(found)


@pytest.mark.slow
@pytest.mark.skipif(LONG not in os.environ, reason=f"takes minutes; set {LONG}=1")
@pytest.mark.parametrize(("bug", "strength"), DEMO_BUGS[0.02], ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_bias_of_two_hundredths_per_step_is_found_on_the_demo_pair(bug, strength):
    check(bug(strength), 0.02)


@pytest.mark.slow
@pytest.mark.skipif(LONG not in os.environ, reason=f"takes minutes; set {LONG}=1")
def test_the_demo_pair_passes_a_long_audit():
    found = on_demo(SiblingRejection(), max_tokens=DEMO_TOKENS[0.02])
    assert found.passed, str(found)
