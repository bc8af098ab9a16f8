"""The loop on real (tiny, random) transformers models."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import specdec
from specdec import Law, Sampling
from specdec.attention import NAME
from specdec.drafters import Drafter, ModelDrafter, NgramDrafter
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)
VOCAB = 50
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
PROMPTS = [torch.arange(1, 6), torch.tensor([9]), torch.arange(30, 42), torch.tensor([3, 4, 3, 4, 3])]
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
         "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}  # fmt: skip


def build(cls, config, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = cls(config).to(dtype).eval()
    for p in model.parameters():
        p.data *= 3 if p.dim() > 1 else 1  # so that masks and positions matter
    return model


def llama(seed=0, **changes):
    return build(LlamaForCausalLM, LlamaConfig(**{**SIZES, **changes}), torch.float64, seed)


def reference(model, prompt, **options):
    return model.generate(prompt[None], **{"max_new_tokens": 24, "do_sample": False, **options})[0, len(prompt) :]


MODELS = {
    "llama": lambda: build(LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen3": lambda: build(Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "gpt2": lambda: build(GPT2LMHeadModel, GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256,
                                                      bos_token_id=1, eos_token_id=7)),
    "gemma3_sliding": lambda: build(Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, sliding_window=8,
                                                                        layer_types=KINDS)),
    "mixtral_sliding": lambda: build(MixtralForCausalLM, MixtralConfig(**SIZES, sliding_window=8, num_local_experts=4)),
    "gpt_oss_sliding": lambda: build(GptOssForCausalLM, GptOssConfig(**SIZES, sliding_window=8, num_local_experts=4,
                                                                     num_experts_per_tok=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_equals_transformers_generate(name):
    model = MODELS[name]()
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


class Failing(Drafter):
    def spec(self, sampling):
        return NgramDrafter(2).spec(sampling)

    def propose(self, context, coins):
        raise RuntimeError("out of memory")


def test_the_model_is_usable_after_a_failure_half_way():
    model = llama()
    found, expected = model.config._attn_implementation, reference(model, PROMPTS[0])
    with pytest.raises(RuntimeError, match="out of memory"):
        specdec.generate(model, PROMPTS[0], Failing())
    assert model.config._attn_implementation == found
    assert torch.equal(specdec.generate(model, PROMPTS[0], max_new_tokens=24).tokens[0], expected)


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


BAD_INPUTS = {
    "empty prompt": ([torch.tensor([], dtype=torch.int64)], {}, "give at least one token"),
    "no prompts": ([], {}, "at least one prompt"),
    "zero budget": (PROMPTS, {"max_new_tokens": 0}, "must be >= 1"),
    "negative budget": (PROMPTS, {"max_new_tokens": -3}, "must be >= 1"),
    "too long": (torch.ones(200, dtype=torch.int64), {}, "max_new_tokens to at most 56"),
    "token out of range": (torch.tensor([1, VOCAB]), {}, "ids 0 to 49"),
    "batched tensor": (torch.ones(2, 3, dtype=torch.int64), {}, "one per prompt"),
    "text without tokenizer": ("hello", {}, "pass tokenizer"),
    "stop token out of range": (PROMPTS, {"stop_tokens": (99,)}, "ids 0 to 49"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_with_the_cure(case):
    prompts, options, cure = BAD_INPUTS[case]
    with pytest.raises(ValueError, match=cure):
        specdec.generate(llama(), prompts, **options)


def test_unfit_models_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="position bias"):
        specdec.generate(
            build(BloomForCausalLM, BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)), PROMPTS
        )
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        specdec.generate(llama().train(), PROMPTS)
    with pytest.raises(ValueError, match="vocabulary has 40 tokens"):
        specdec.generate(llama(), PROMPTS, ModelDrafter(llama(vocab_size=40)), max_new_tokens=8)
    with pytest.raises(ValueError, match="PreTrainedModel"):
        specdec.generate(torch.nn.Linear(2, 2), PROMPTS)


def test_logits_that_are_no_law_are_an_error_when_visited():
    model = llama()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        specdec.generate(model, PROMPTS, max_new_tokens=8)


@pytest.mark.parametrize("field", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 2.0}])
def test_sampling_refuses_values_out_of_range(field):
    with pytest.raises(ValueError, match="must be"):
        Sampling(**field)
