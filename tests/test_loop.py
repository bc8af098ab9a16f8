"""The loop on real (tiny, random) transformers models."""

import threading
from itertools import zip_longest

import pytest
import torch
from tiny_models import GATE, PROMPTS, llama, reference, state
from transformers import GenerationConfig

import specdec
from specdec import Law, Sampling
from specdec.drafters import Fallback, LayerSkipDrafter, ModelDrafter, NgramDrafter, SuffixDrafter
from specdec.engines.base import Engine
from specdec.models.attention import NAME
from specdec.testing import Tape
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)
ENGINES = {"eager": Engine, "graph": specdec.Graphs, "tape": lambda: specdec.Graphs(capture=Tape)}


@pytest.mark.parametrize("name", GATE)
def test_greedy_text_equals_transformers_generate(name):
    model = GATE[name]()
    found = model.config._attn_implementation
    expected = [reference(model, p) for p in PROMPTS]
    drafters = [None, NgramDrafter(4), *(ModelDrafter(model, t) for t in (Chain(4), Widths((2, 2)), Dynamic(8, 3, 2)))]
    for drafter in drafters:
        out = specdec.generate(model, PROMPTS, drafter, max_new_tokens=24)
        assert all(map(torch.equal, out.tokens, expected)), drafter
    assert out.summary()["acceptance_length"] > 1.5  # the model drafts for itself
    assert model.config._attn_implementation == found


def test_text_ends_at_a_stop_token_in_every_place():
    model, prompt = llama(), PROMPTS[0]
    text = reference(model, prompt, eos_token_id=-1)
    for place, token in enumerate(text.tolist()):
        out = specdec.generate(model, prompt, ModelDrafter(model), max_new_tokens=24, stop_tokens=(token,))
        assert torch.equal(out.tokens[0], text[: text.tolist().index(token) + 1]), place


@pytest.mark.parametrize("law", [Law.IID, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP])
def test_a_row_does_not_depend_on_the_other_rows(law):
    model, drafter = llama(), ModelDrafter(llama(1, num_hidden_layers=1), Widths((3, 2), law))
    options = {"sampling": Sampling(1.0), "seed": 5, "max_new_tokens": 24}
    alone = specdec.generate(model, PROMPTS[0], drafter, **options).tokens[0]
    assert torch.equal(specdec.generate(model, PROMPTS, drafter, **options).tokens[0], alone)


def test_a_model_that_drafts_for_itself_is_always_accepted():
    model = llama()
    summary = specdec.generate(model, PROMPTS, ModelDrafter(model), sampling=Sampling(1.0), stop_tokens=()).summary()
    assert min(summary["acceptance_rate"]) == 1


def test_stream_yields_what_generate_returns_and_leaves_the_model_alone():
    model, draft = llama(), llama(1, num_hidden_layers=1)
    found = model.config._attn_implementation
    parts = [[] for _ in PROMPTS]
    for new in specdec.stream(model, PROMPTS, ModelDrafter(draft), max_new_tokens=24):
        assert model.config._attn_implementation == draft.config._attn_implementation == found != NAME
        for part, tokens in zip(parts, new, strict=True):
            part.extend(tokens.tolist())
    assert parts == [t.tolist() for t in specdec.generate(model, PROMPTS, max_new_tokens=24).tokens]


@pytest.mark.filterwarnings("ignore:engine")  # what cannot be captured
@pytest.mark.parametrize("engine", ENGINES)
def test_what_begins_in_inference_mode_goes_on_outside(engine):
    model, engine = llama(), ENGINES[engine]()
    drafter, options = ModelDrafter(llama(1, num_hidden_layers=1)), {"max_new_tokens": 8, "stop_tokens": ()}
    expected = specdec.generate(model, PROMPTS, **options).tokens
    options["engine"] = engine
    with torch.inference_mode():
        last = specdec.generate(model, PROMPTS, drafter, keep=True, **options)
        specdec.generate(model, PROMPTS, drafter, **options)  # the engine keeps what it owned
        stream = specdec.stream(model, PROMPTS, drafter, **options)
        steps = [next(stream)]
    steps += stream
    found = [specdec.generate(model, PROMPTS, drafter, resume=resume, **options).tokens for resume in (None, last)]
    for tokens in (*found, [*map(torch.cat, zip(*steps, strict=True))]):
        assert all(map(torch.equal, tokens, expected))


@pytest.mark.parametrize("failing", ["target", "draft"])
def test_models_are_usable_after_running_out_of_memory_half_way(failing, monkeypatch):
    pair = {"target": llama(), "draft": llama(1)}
    found, expected = (state(pair["target"]), state(pair["draft"])), reference(pair["target"], PROMPTS[0])
    calls, forward = [], pair[failing].model.layers[1].forward

    def fail_late(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(pair[failing].model.layers[1], "forward", fail_late)
        specdec.generate(pair["target"], PROMPTS[0], ModelDrafter(pair["draft"]), max_new_tokens=24)
    assert (state(pair["target"]), state(pair["draft"])) == found
    out = specdec.generate(pair["target"], PROMPTS[0], ModelDrafter(pair["draft"]), max_new_tokens=24)
    assert torch.equal(out.tokens[0], expected)


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[5], [6, 8]]}, {"min_new_tokens": 9}],
    ids=lambda o: next(iter(o)),
)
def test_a_generation_config_gives_the_text_of_transformers(options):
    model = llama()
    config = GenerationConfig(do_sample=False, eos_token_id=7, pad_token_id=0, **options)
    expected = [reference(model, p, **options) for p in PROMPTS]
    out = specdec.generate(
        model,
        PROMPTS,
        ModelDrafter(model, Widths((2, 1))),
        sampling=Sampling.from_generation_config(config),
        max_new_tokens=24,
    )
    assert [t.tolist() for t in out.tokens] == [t.tolist() for t in expected]


def test_models_in_two_threads_do_not_meet():
    pairs = [(llama(seed), llama(seed + 2, num_hidden_layers=1)) for seed in (0, 1)]

    def run(pair):
        return specdec.generate(
            pair[0], PROMPTS, ModelDrafter(pair[1]), sampling=Sampling(1.0), max_new_tokens=24
        ).tokens

    expected, found = [run(pair) for pair in pairs], [None, None]
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, run(pairs[i]))) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for e, f in zip(expected, found, strict=True) for a, b in zip(e, f, strict=True))


SHARED = {
    "draft": lambda target: ModelDrafter(llama(1, num_hidden_layers=1), Widths((2, 1))),
    "the target": lambda target: ModelDrafter(target, Chain(3)),
    "layers left out": lambda target: LayerSkipDrafter(skip=[1]),
    "suffixes, then the draft": lambda target: Fallback(SuffixDrafter(), ModelDrafter(llama(1), Dynamic(8, 3, 2))),
}


@pytest.mark.filterwarnings("ignore:engine")  # what cannot be captured
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SHARED)
def test_interleaved_streams_that_share_all_parts_give_the_texts_of_single_runs(name, engine):
    model = llama()
    target, drafter, engine = specdec.ModelTarget(model), SHARED[name](model), ENGINES[engine]()
    options = {"sampling": Sampling(0.7), "max_new_tokens": 10, "stop_tokens": ()}
    batches = [(PROMPTS[:2], 1), (PROMPTS[:2], 2), (PROMPTS[1:], 3)]  # two runs of one kind, and one of another
    expected = [
        specdec.generate(model, rows, SHARED[name](model), seed=seed, **options).tokens for rows, seed in batches
    ]
    for _ in range(2):  # again, in what the first ones gave back
        streams = [specdec.stream(target, rows, drafter, engine=engine, seed=seed, **options) for rows, seed in batches]
        steps = [*zip_longest(*streams)]
        found = [
            [torch.cat(parts) for parts in zip(*filter(None, one), strict=True)] for one in zip(*steps, strict=True)
        ]
        assert [[t.tolist() for t in texts] for texts in found] == [[t.tolist() for t in texts] for texts in expected]


def test_the_cache_follows_autocast():
    model = llama(dtype=torch.float32)
    expected = specdec.generate(model, PROMPTS[0], max_new_tokens=8).tokens[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        specdec.generate(model, PROMPTS[0], ModelDrafter(model), max_new_tokens=8)
    assert torch.equal(specdec.generate(model, PROMPTS[0], ModelDrafter(model), max_new_tokens=8).tokens[0], expected)


@pytest.mark.parametrize("engine", [Engine, specdec.Graphs])
def test_parts_that_were_made_outside_autocast_serve_inside_and_again_outside(engine):
    model = llama(dtype=torch.float32)
    target, drafter, engine = specdec.ModelTarget(model), ModelDrafter(llama(1, torch.float32)), engine()
    last = None
    for enabled in (True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for _ in range(2):
                options = {"max_new_tokens": 8, "engine": engine, "resume": last, "keep": True}
                last = specdec.generate(target, PROMPTS[0], drafter, **options)
                assert torch.equal(last.tokens[0], reference(model, PROMPTS[0], max_new_tokens=8))
                found = {t.dtype for layer in last.runs.target.cached.cache.layers for t in (layer.keys, layer.values)}
                assert (torch.bfloat16 in found) == enabled


class Words:
    """A tokenizer with one word per id."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def get_vocab(self):
        return {str(i): i for i in range(self.size)}

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("size", [40, 60])
@pytest.mark.parametrize("tree", [Chain(3), Widths((3, 2)), Dynamic(6, 2, 3)], ids=str)
def test_vocabularies_may_differ_by_padding(size, tree):
    model, words = llama(), Words(40)
    drafter = ModelDrafter(llama(1, vocab_size=size), tree, tokenizer=words)
    out = specdec.generate(model, PROMPTS, drafter, tokenizer=words, max_new_tokens=24)
    assert [t.tolist() for t in out.tokens] == [reference(model, p).tolist() for p in PROMPTS]
    assert out.text == [words.decode(t.tolist()) for t in out.tokens]
    specdec.generate(model, PROMPTS, drafter, tokenizer=words, sampling=Sampling(1.0, top_p=0.9), max_new_tokens=24)


@pytest.mark.parametrize("eos", [4, [4, 9, 33], None])
def test_a_generation_config_ends_texts_where_transformers_does(eos):
    model = llama()
    config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=0)
    out = specdec.generate(model, PROMPTS, sampling=Sampling.from_generation_config(config), max_new_tokens=24)
    expected = [model.generate(p[None], generation_config=config, max_new_tokens=24)[0, len(p) :] for p in PROMPTS]
    assert [t.tolist() for t in out.tokens] == [t.tolist() for t in expected]
