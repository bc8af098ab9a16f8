"""Models off the beaten track: decoded as transformers decodes them, or refused with the reason and the cure."""

from functools import partial

import accelerate
import pytest
import torch
from tiny_models import LIMITED, PROMPTS, SIZES, TOKENS, build, llama, reference
from transformers import MllamaTextConfig, MusicgenDecoderConfig, MusicgenForCausalLM

import specdec
from specdec.drafters import LayerSkipDrafter, ModelDrafter, NgramDrafter
from specdec.models.ready import UnsupportedModel
from specdec.trees import Widths

torch.set_num_threads(1)
PROMPT = PROMPTS[2]
ENCODER = {**TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {**TOKENS, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
        "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": 64,
        "decoder_start_token_id": 1}  # fmt: skip
HRM = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 4}


def mllama():
    text = MllamaTextConfig(**{**SIZES, "num_hidden_layers": 4, "cross_attention_layers": [1]})
    return build("MllamaForCausalLM", **text.to_dict())


def musicgen():
    config = MusicgenDecoderConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48
    )
    return MusicgenForCausalLM(config).eval()


DECODED = {
    "bert": partial(build, "BertLMHeadModel", **ENCODER, is_decoder=True),
    "roberta": partial(build, "Roberta", **ENCODER, is_decoder=True, max_position_embeddings=64),
    "mllama": mllama,
    "hrm_text": partial(build, "HrmText", **HRM),
}


@pytest.mark.parametrize("name", DECODED)
def test_text_is_that_of_transformers(name):
    model = DECODED[name]()
    for drafter in (NgramDrafter(), ModelDrafter(model, Widths((2, 1)))):
        out = specdec.generate(model, PROMPTS, drafter, max_new_tokens=12)
        assert [t.tolist() for t in out.tokens] == [reference(model, p, max_new_tokens=12).tolist() for p in PROMPTS]


BY_PLACE = "numbers tokens by their place in the cache, whatever position_ids say.*Supported are"
REFUSED = {
    **{kind: (partial(build, kind, **BART), BY_PLACE) for kind in ("Bart", "Blenderbot", "BlenderbotSmall", "MBart", "Marian",
                                                                   "Pegasus", "PLBart", "BigBirdPegasus")},
    "Bert, of both sides": (partial(build, "BertLMHeadModel", **ENCODER), "reads both ways .*is_decoder=True"),
    "Musicgen, of several streams": (musicgen, "does not read one token at a time"),
    "TrOCR": (partial(build, "TrOCR", **BART), "does not go through transformers' attention interface.*Supported are"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_follow_a_tree_is_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=reason):
        specdec.generate(model, PROMPT)
    with pytest.raises(ValueError, match=reason):
        ModelDrafter(model)


def test_layers_that_run_several_times_cannot_be_left_out():
    with pytest.raises(
        ValueError, match=r"HrmTextForCausalLM has no list of the 16 layers .*more than once.*NgramDrafter\(\)"
    ):
        specdec.generate(DECODED["hrm_text"](), PROMPT, LayerSkipDrafter(exit_layer=1))


@pytest.mark.parametrize("role", ["target", "draft"])
def test_weights_that_accelerate_offloads_decode(role):
    model, other = llama(0), llama(1)
    expected = reference(model if role == "target" else other, PROMPT).tolist()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.get_input_embeddings().weight.is_meta
    target, drafter = (model, ModelDrafter(other)) if role == "target" else (other, ModelDrafter(model))
    target = specdec.ModelTarget(target)
    last, options = None, {"max_new_tokens": 24, "keep": True}
    for _ in range(2):
        last = specdec.generate(target, PROMPT, drafter, resume=last, **options)
        assert last.tokens[0].tolist() == expected
    if role == "target":  # what has been written to weights that lie elsewhere cannot be seen
        weight = model.model.layers[0].self_attn.v_proj._hf_hook.weights_map["weight"]
        weight.copy_(weight.flip(0))
        [found] = specdec.generate(target, PROMPT, drafter, resume=last, **options).tokens
        assert found.tolist() == reference(model, PROMPT).tolist() != expected


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = build("Llama", **SIZES)
    with pytest.raises(UnsupportedModel, match=r"weights are on the meta device.*from_pretrained"):
        specdec.generate(model, PROMPT)


WRAPPED = {"module": torch.nn.DataParallel, "_orig_mod": torch.compile}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch.compile
@pytest.mark.parametrize("inside", WRAPPED)
def test_a_wrapped_model_is_refused_with_the_name_of_what_to_pass(inside):
    wrapper = WRAPPED[inside](llama()).eval()
    match = rf"is a {type(wrapper).__name__}; pass the model in it, \.{inside}"
    for use in (ModelDrafter, specdec.ModelTarget, lambda model: specdec.generate(model, PROMPT)):
        with pytest.raises(ValueError, match=match):
            use(wrapper)
    with pytest.raises(ValueError, match="model is a str; pass a transformers model, as from AutoModelForCausalLM"):
        ModelDrafter("gpt2")


REASONS = {"phi3_longrope": "LongRoPE rotates every key anew", "llama4_tuned": "Llama 4 scales by the slot"}


@pytest.mark.parametrize("name", REASONS)
def test_why_texts_end_where_logits_begin_to_depend_on_the_forward_pass_is_said(name):
    model, limit = LIMITED[name]()
    with pytest.raises(
        ValueError, match=rf"context of {limit} \(beyond it {REASONS[name]}.*set max_new_tokens to at most"
    ):
        specdec.generate(model, PROMPT, max_new_tokens=limit)
    with pytest.raises(
        ValueError, match=rf"reads at most {limit} tokens \(beyond it {REASONS[name]}.*lower max_new_tokens"
    ):
        specdec.generate(build("Llama", **SIZES), PROMPT, ModelDrafter(model), max_new_tokens=limit)
