"""Sampling laws are those of transformers, and generation configs mean what they mean there."""

from fractions import Fraction

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import specdec
from specdec import Graphs, Sampling, generate, stream
from specdec.drafters import ModelDrafter
from specdec.rules import (
    BlockVerification,
    LevelVerification,
    Rule,
    SiblingRejection,
    TraversalVerification,
    TypicalAcceptance,
)
from specdec.testing import exact_law
from specdec.trace import replay
from specdec.trees import Widths

ROUNDING = 1e-12  # the same float64 operations in another order
FLOAT32 = 1e-6  # transformers' generate rounds logits to float32, we keep float64
VOCAB, PROMPT = 5, (1, 2, 1)


@pytest.mark.parametrize("top_k", [None, 1, 7, 500])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.9])
@pytest.mark.parametrize("min_p", [None, 0.05])
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_laws_equal_those_of_the_warpers_of_transformers(temperature, top_k, top_p, min_p):
    logits = torch.randn(64, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3  # no ties
    scores: torch.Tensor = TemperatureLogitsWarper(temperature)(None, logits)  # type: ignore[arg-type]
    for warper, value in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p), (MinPLogitsWarper, min_p)):
        if value is not None:
            scores = warper(value)(None, scores)
    law = Sampling(temperature, top_k, top_p, min_p).probabilities(logits)
    assert float((law - scores.softmax(-1)).abs().max()) <= ROUNDING


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
def test_the_nucleus_is_the_smallest_set_of_largest_probabilities(top_p, spread):
    logits = torch.randn(2, 8, 30_000, generator=torch.Generator().manual_seed(0)) * spread
    kept = Sampling(1.0, top_p=top_p).probabilities(logits) > 0
    probs = logits.softmax(-1)
    ascending = probs.double().sort(-1)
    mass = ascending.values.cumsum(-1)  # of what is no larger; the largest stays whatever top_p is
    mass[..., -1] = 1
    expected = torch.zeros_like(kept).scatter_(-1, ascending.indices, mass > 1 - top_p)
    differing = (kept ^ expected).double() * probs  # sums are in float32
    assert float(differing.sum(-1).max()) <= FLOAT32


def test_ties_are_in_the_nucleus():
    ties = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(Sampling(1.0, top_p=0.5).probabilities(ties), ties.softmax(-1))
    assert torch.equal(Sampling(1.0, top_p=0.3).probabilities(ties), ties)


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         max_position_embeddings=32, bos_token_id=0, eos_token_id=4, pad_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for p in model.parameters():
        p.data *= 3 if p.dim() > 1 else 1
    return model


class Known(Exception):
    """Carries the law after a prefix out of `model.generate`."""


def law_after(model, config, prefix) -> list[float]:
    """[vocab]: what `model.generate` samples the next token from, after `prefix` was forced upon it."""

    def force(ids, scores):
        place = ids.shape[1] - len(PROMPT)
        if place == len(prefix):
            raise Known(scores.softmax(-1)[0].tolist())
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor(prefix[place]), 0)

    prepare = model._get_logits_processor
    model._get_logits_processor = lambda *args, **kwargs: LogitsProcessorList([*prepare(*args, **kwargs), force])
    try:
        model.generate(torch.tensor([PROMPT]), generation_config=config)
    except Known as known:
        return known.args[0]
    finally:
        del model._get_logits_processor
    raise AssertionError(f"transformers ended the text before {prefix}")


def law_of_generate(model, config) -> dict[tuple[int, ...], Fraction]:
    """The law of `model.generate` itself, by following its own scores after every prefix."""
    laws, ended = {(): 1.0}, {}
    while laws:
        text, mass = laws.popitem()
        for token, p in enumerate(law_after(model, config, text)):
            if p > 0:
                longer = (*text, token)
                done = token == config.eos_token_id or len(longer) == config.max_new_tokens
                (ended if done else laws)[longer] = mass * p
    return {text: Fraction(p) for text, p in ended.items()}


OPTIONS = [
    {"temperature": 0.7, "top_k": 3, "top_p": 0.9},
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[3], [2, 1]], "top_k": 0},
    {"min_new_tokens": 2},
    {"min_length": 5},
    {"suppress_tokens": [2]},
    {"begin_suppress_tokens": [3]},
    {"forced_bos_token_id": 2},
    {"forced_eos_token_id": 4},
    {"exponential_decay_length_penalty": (1, 1.5)},
    {"sequence_bias": [[[2], 1.5], [[1, 3], -2.0]]},
    {"typical_p": 0.7},
    {"epsilon_cutoff": 0.15},
    {"eta_cutoff": 0.15},
    {"min_p": 0.2, "temperature": 1.4},
    {"renormalize_logits": True, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_a_generation_config_gives_the_law_of_transformers(options):
    model, draft = llama(0), llama(1)
    config = GenerationConfig(
        do_sample=True, max_new_tokens=2, eos_token_id=4, pad_token_id=0, bos_token_id=0, **options
    )
    sampling = Sampling.from_generation_config(config)
    drafter = ModelDrafter(draft, Widths((2,)))
    # without merging, as what a config means depends on where the prompt ends
    law = exact_law(model, PROMPT, drafter, sampling=sampling, max_new_tokens=2, stop_tokens=(4,), merge=False)
    assert float(law.total_variation(law_of_generate(model, config))) <= FLOAT32


class Sentence(LogitsProcessor):
    """Knows nothing to follow token 4."""

    def __call__(self, text, scores):
        assert 4 not in text[0, len(PROMPT) :]
        return scores


@pytest.mark.parametrize("rule", [SiblingRejection(), TraversalVerification()])
def test_processors_are_not_asked_what_follows_the_end_of_a_text(rule):
    options = {"sampling": Sampling(1.0, processors=[Sentence()]), "max_new_tokens": 12, "stop_tokens": (4,)}
    out = generate(llama(0), [torch.tensor(PROMPT)] * 8, ModelDrafter(llama(0), Widths((3, 2))), rule=rule, **options)
    assert any(len(text) < 12 for text in out.tokens)


class Even(LogitsProcessor):
    """Allows even tokens only, and knows nothing to follow an odd one."""

    def __call__(self, text, scores):
        assert not any(token % 2 for token in text[0, len(PROMPT) :])
        scores[:, 1::2] = -torch.inf
        return scores


class Specified(TraversalVerification):
    decide_batch = Rule.decide_batch


@pytest.mark.parametrize("level", ["summary", "ceiling", "laws"])
@pytest.mark.parametrize(
    "rule",
    [
        SiblingRejection(),
        TraversalVerification(),
        Specified(),
        BlockVerification(),
        LevelVerification(),
        TypicalAcceptance(),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_processors_are_not_asked_what_follows_an_impossible_token(rule, level):
    tree = Widths((1, 1, 1) if isinstance(rule, BlockVerification) else (2, 2, 1))
    options = {"sampling": Sampling(1.0, processors=[Even()]), "max_new_tokens": 24, "stop_tokens": ()}
    out = generate(llama(0), torch.tensor(PROMPT), ModelDrafter(llama(0), tree), rule=rule, trace=level, **options)
    assert len(out.tokens[0]) == 24 and not (out.tokens[0] % 2).any()
    if level == "laws":
        again = [step.record.decisions for step in replay(out.trace, rule).steps]
        assert all(torch.equal(a.token, s.record.decisions.token) for a, s in zip(again, out.trace.steps, strict=True))


def test_one_engine_serves_several_runs_of_a_generation_config():
    sampling, engine = Sampling.from_generation_config(GenerationConfig(do_sample=True, top_k=3)), Graphs()
    model = llama(0)
    texts = [generate(model, torch.tensor(PROMPT), sampling=sampling, max_new_tokens=4, engine=engine) for _ in "12"]
    assert torch.equal(*(out.tokens[0] for out in texts))


def test_a_generation_config_of_another_mode_has_no_law():
    for options in {"num_beams": 2}, {"penalty_alpha": 0.6, "top_k": 4}:
        sampling = Sampling.from_generation_config(GenerationConfig(**options))
        with pytest.raises(ValueError, match="only greedy search and sampling"):
            generate(llama(0), torch.tensor(PROMPT), sampling=sampling, max_new_tokens=4)


STOPS = GenerationConfig(stop_strings=["if not", "return", "_"], max_new_tokens=24)


@pytest.mark.parametrize("default", [False, True], ids=["of the config", "of the model"])
def test_stop_strings_of_a_generation_config_end_texts_where_transformers_does(default, monkeypatch):
    pair, config = specdec.demo.load(), STOPS
    if default:
        monkeypatch.setattr(pair.target.generation_config, "stop_strings", STOPS.stop_strings)
        config = GenerationConfig(max_new_tokens=24)
    texts = [p.text for p in pair.prompts[:24:8]]
    options = {"sampling": Sampling.from_generation_config(config), "tokenizer": pair.tokenizer, "max_new_tokens": 24}
    out = generate(pair.target, texts, ModelDrafter(pair.draft, Widths((2, 1, 1))), trace="laws", **options)
    streamed = list(stream(pair.target, texts, ModelDrafter(pair.draft), **options))
    for row, text in enumerate(texts):
        prompt = pair.tokenizer(text, return_tensors="pt")
        expected = pair.target.generate(**prompt, generation_config=config, tokenizer=pair.tokenizer)
        expected = expected[0, prompt["input_ids"].shape[1] :].tolist()
        assert out.tokens[row].tolist() == torch.cat([step[row] for step in streamed]).tolist() == expected
        assert sum(step.emitted[row] for step in out.trace.steps) == len(expected)
    assert any(len(tokens) < 24 for tokens in out.tokens)
    again = replay(out.trace, SiblingRejection()).steps
    assert [step.emitted for step in again] == [step.emitted for step in out.trace.steps]


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="`tokenizer` argument"):
        generate(llama(0), torch.tensor(PROMPT), sampling=Sampling.from_generation_config(STOPS), max_new_tokens=4)
