"""Log-probabilities of emitted tokens are those of the target on the whole text."""

import warnings
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny_models import PROMPTS, VOCAB, llama
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import specdec
from certificates.cases import PROMPT
from specdec import Sampling
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.rules import (
    BlockVerification,
    LenientRejection,
    LevelVerification,
    SiblingRejection,
    TraversalVerification,
)
from specdec.rules.base import Decision, Rule
from specdec.testing import Table, TabularDrafter, TabularTarget, Tape, target_law
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)
TARGET, DRAFT = llama(0, torch.float32), llama(0, torch.float32)
torch.manual_seed(1)
for weights in DRAFT.parameters():  # it often agrees with the target, but not always
    weights.data += 0.15 * weights.data.std() * torch.randn_like(weights) if weights.dim() > 1 else 0
PAIR = specdec.demo.load()
GREEDY, NUCLEUS = Sampling(), Sampling(0.7, top_k=12, top_p=0.9)


class Cycle(LogitsProcessor):
    """Keeps state: the number of the call says which third of the vocabulary is allowed."""

    step = 0

    def __call__(self, input_ids, scores):
        low = VOCAB // 3 * (self.step % 3)
        self.step += 1
        allowed = torch.arange(VOCAB).clamp(low, low + VOCAB // 3 - 1) == torch.arange(VOCAB)
        return scores.masked_fill(~allowed, -torch.inf)


def warped(scores, sampling):
    """What transformers' own warpers make of scores [token, vocab]."""
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [] if sampling.top_k is None else [TopKLogitsWarper(sampling.top_k)]
    warpers += [] if sampling.top_p is None else [TopPLogitsWarper(sampling.top_p)]
    for warper in warpers:
        scores = warper(None, scores)
    return scores


@torch.no_grad()
def forced(model, prompt, tokens, sampling=GREEDY):
    """(logprobs, raw_logprobs) [token] by one pass over the whole text, and the law that transformers gives."""
    text = torch.cat([prompt, tokens])
    logits = model(text[None]).logits[0, len(prompt) - 1 : -1].float()
    processors, scores = deepcopy(sampling.processors), logits.clone()
    for place in range(len(tokens)):
        for processor in processors:
            scores[place : place + 1] = processor(text[None, : len(prompt) + place], scores[place : place + 1])
    if sampling.temperature:
        law = warped(scores, sampling).log_softmax(-1)
    else:
        law = torch.full_like(scores, -torch.inf).scatter(1, scores.argmax(1, keepdim=True), 0)
    return [part.gather(1, tokens[:, None])[:, 0] for part in (law, logits.log_softmax(-1))]


def assert_forced(out, model=TARGET, prompts=PROMPTS, sampling=GREEDY, at_least=6):
    rows = zip(prompts, out.tokens, out.logprobs, out.raw_logprobs, strict=True)
    for prompt, tokens, logprobs, raw in rows:
        assert logprobs.shape == raw.shape == tokens.shape
        assert logprobs.dtype == raw.dtype == torch.float32 and not logprobs.is_inference()
        for found, expected in zip((logprobs, raw), forced(model, prompt, tokens, sampling), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert max(map(len, out.tokens)) >= at_least


CHAIN = ModelDrafter(DRAFT, Chain(3))
TREE = ModelDrafter(DRAFT, Widths((2, 1, 1)))
PENALTY = Sampling(1.0, processors=[RepetitionPenaltyLogitsProcessor(1.8)])
CASES = {
    "no draft": (None, SiblingRejection(), NUCLEUS),
    "greedy chain": (CHAIN, SiblingRejection(), Sampling()),
    "greedy tree": (TREE, SiblingRejection(), Sampling()),
    "chain": (CHAIN, SiblingRejection(), NUCLEUS),
    "tree": (TREE, SiblingRejection(), NUCLEUS),
    "n-grams": (NgramDrafter(3), SiblingRejection(), Sampling()),
    "dynamic tree": (ModelDrafter(DRAFT, Dynamic(8, 3, 2)), SiblingRejection(), Sampling(1.0, top_k=9)),
    "block": (CHAIN, BlockVerification(), NUCLEUS),
    "traversal": (TREE, TraversalVerification(), NUCLEUS),
    "level": (TREE, LevelVerification(), NUCLEUS),
    "processor": (CHAIN, SiblingRejection(), PENALTY),
    "greedy with a processor": (TREE, SiblingRejection(), replace(PENALTY, temperature=0.0)),
    "state, from the root down": (TREE, SiblingRejection(), replace(NUCLEUS, processors=[Cycle()])),
    "state, all nodes": (TREE, TraversalVerification(), replace(NUCLEUS, processors=[Cycle()])),
}


@pytest.mark.parametrize("case", CASES)
def test_they_equal_teacher_forcing(case):
    drafter, rule, sampling = CASES[case]
    options = {"rule": rule, "sampling": sampling, "max_new_tokens": [12, 5, 9, 1], "stop_tokens": (7, 30), "seed": 2}
    out = specdec.generate(TARGET, PROMPTS, drafter, logprobs=True, **options)
    assert_forced(out, sampling=sampling)
    assert drafter is None or out.summary()["acceptance_length"] > 1.3
    plain = specdec.generate(TARGET, PROMPTS, drafter, **options)
    assert all(map(torch.equal, out.tokens, plain.tokens))
    assert plain.logprobs is plain.raw_logprobs is None


def test_greedy_text_is_certain_under_the_law_and_not_under_the_raw_logits():
    out = specdec.generate(TARGET, PROMPTS, TREE, max_new_tokens=8, logprobs=True)
    assert all(not row.any() for row in out.logprobs) and all((row < 0).all() for row in out.raw_logprobs)


class AcceptAll(Rule):
    """Not lossless: accepts the first child of every node."""

    def decide(self, tree, target_law, coins):
        path = [0]
        while children := tree.children(path[-1]):
            path.append(children[0])
        return Decision(path, coins.pick(path[-1], target_law.probs(path[-1])))


@pytest.mark.parametrize("rule", [LenientRejection(0.2), AcceptAll()])
def test_under_a_rule_that_is_not_lossless_they_are_the_targets(rule):
    options = {"sampling": Sampling(1.0, top_k=3), "max_new_tokens": 12, "stop_tokens": (), "logprobs": True}
    out = specdec.generate(TARGET, PROMPTS, CHAIN, rule=rule, **options)
    assert_forced(out, sampling=options["sampling"])
    # whether a token was emitted that the target would not have emitted
    assert bool(torch.cat(out.logprobs).isinf().any()) == isinstance(rule, AcceptAll)


@pytest.mark.parametrize("drafter", [CHAIN, TREE])
@pytest.mark.parametrize("sampling", [Sampling(), NUCLEUS], ids=["greedy", "nucleus"])
def test_captured_stages_give_them_too(drafter, sampling):
    engine = specdec.Graphs(capture=Tape)
    options = {"sampling": sampling, "max_new_tokens": [12, 5, 9, 1], "stop_tokens": (), "engine": engine}
    for seed, asked, captured in ((0, True, 4), (1, True, 4), (2, False, 8), (3, True, 8)):
        out = specdec.generate(TARGET, PROMPTS, drafter, seed=seed, logprobs=asked, **options)
        if asked:
            assert_forced(out, sampling=sampling)
        else:
            assert out.logprobs is None
        assert engine.captured == captured


def test_stages_beside_those_that_are_captured_give_them_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stage that processors keep from being captured
        options = {"sampling": PENALTY, "max_new_tokens": 12, "stop_tokens": (), "logprobs": True}
        out = specdec.generate(TARGET, PROMPTS, TREE, engine=specdec.Graphs(capture=Tape), **options)
    assert_forced(out, sampling=PENALTY)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_of_the_demo_pair_have_them_up_to_their_stop_string(temperature):
    texts = [prompt.text for prompt in PAIR.prompts[:24:8]]
    prompts = [PAIR.tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]
    law = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
    config = GenerationConfig(stop_strings=["e"], eos_token_id=PAIR.tokenizer.eos_token_id, pad_token_id=0, **law)
    options = {"sampling": Sampling.from_generation_config(config), "max_new_tokens": 16, "tokenizer": PAIR.tokenizer}
    out = specdec.generate(PAIR.target, texts, ModelDrafter(PAIR.draft, Chain(4)), logprobs=True, **options)
    assert_forced(out, PAIR.target, prompts, Sampling(temperature, top_k=50 if temperature else None), at_least=2)
    assert min(map(len, out.tokens)) < 16


def test_their_sum_is_the_log_probability_of_the_text():
    target, drafter = TabularTarget(3, seed=0), TabularDrafter(Table(3, seed=1), Chain(2))
    options = {"sampling": Sampling(1.0), "max_new_tokens": 4, "stop_tokens": (0,)}
    law = target_law(target, PROMPT, **options)
    out = specdec.generate(target, [torch.tensor(PROMPT)] * 16, drafter, logprobs=True, **options)
    for tokens, logprobs in zip(out.tokens, out.logprobs, strict=True):
        assert float(logprobs.sum().exp()) == pytest.approx(float(law[tuple(tokens.tolist())]), rel=1e-5)
    assert len({len(tokens) for tokens in out.tokens}) > 1


def test_a_stream_has_those_of_the_text_so_far():
    options = {"sampling": NUCLEUS, "max_new_tokens": 12, "stop_tokens": ()}
    stream = specdec.stream(TARGET, PROMPTS, CHAIN, logprobs=True, **options)
    next(stream)
    for _ in range(2):
        next(stream)
        assert_forced(stream.generation, sampling=NUCLEUS, at_least=2)
    specdec.generate(TARGET, PROMPTS, CHAIN, **options)
    assert_forced(stream.generation, sampling=NUCLEUS, at_least=2)


def test_a_turn_that_goes_on_has_those_of_its_own_tokens():
    options = {"sampling": NUCLEUS, "max_new_tokens": 6, "stop_tokens": (), "logprobs": True}
    turn = specdec.generate(TARGET, PROMPTS, TREE, keep=True, **options)
    said = [torch.cat([prompt, new, prompt]) for prompt, new in zip(PROMPTS, turn.tokens, strict=True)]
    assert_forced(specdec.generate(TARGET, said, TREE, resume=turn, **options), prompts=said, sampling=NUCLEUS)


class Counted(LogitsProcessor):
    """Notes its calls in one list for all copies."""

    def __init__(self, calls):
        self.calls = calls

    def __deepcopy__(self, memo):
        return Counted(self.calls)

    def __call__(self, input_ids, scores):
        self.calls.append("process")
        return scores


def test_they_take_no_forward_pass_and_no_call_of_a_processor():
    calls = []
    hook = TARGET.register_forward_hook(lambda *_: calls.append("forward"))
    sampling = Sampling(1.0, processors=[Counted(calls)])
    counts = []
    for asked in (False, True, False):
        calls.clear()
        specdec.generate(TARGET, PROMPTS, TREE, sampling=sampling, max_new_tokens=8, stop_tokens=(), logprobs=asked)
        counts.append((calls.count("forward"), calls.count("process")))
    hook.remove()
    assert min(counts[0]) > 0 and counts[1] == counts[2]  # the first run may look at the model once


def test_what_is_neither_yes_nor_no_is_refused():
    with pytest.raises(ValueError, match=r"logprobs.*True or False"):
        specdec.generate(TARGET, PROMPTS, logprobs=5)
