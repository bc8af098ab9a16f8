"""Files of DFlash and DSpark: those that tools write give the same network, and are written as engines read them."""

import json
from dataclasses import replace

import pytest
import torch
from block_nets import (
    NORMS,
    PROMPTS,
    SIZES,
    dflash,
    drafts,
    drawn,
    dspark,
    heard,
    plain_block,
    reduced,
    target,
)
from safetensors.torch import load_file
from transformers import Qwen3Config

import specdec
from specdec.drafters.block_files import BlockReading
from specdec.drafters.checkpoints import write_checkpoint
from specdec.drafters.dflash import DFlashDrafter
from specdec.drafters.dspark import DSparkDrafter
from specdec.trees import Chain

torch.set_num_threads(1)


def assert_same_drafts(found, expected):
    pairs = [*zip(drafts(found), drafts(expected), strict=True)]
    assert len(pairs) > 1 and all(torch.equal(*each) for one, other in pairs for each in zip(one, other, strict=True))


NETS = {
    "dflash": lambda: DFlashDrafter(dflash()),
    "dflash, own head": lambda: DFlashDrafter(reduced(dflash(vocab=3))),
    "vanilla": lambda: DSparkDrafter(dspark(states=(0, 2), confident=True)),
    "gated": lambda: DSparkDrafter(dspark(states=(0, 2), gated=True, from_anchor=False, slots=3)),
    "gated, own head": lambda: DSparkDrafter(reduced(dspark(states=(0, 2), gated=True, drafted=3))),
}


@pytest.mark.parametrize("format", ["plain", "speculators"])
@pytest.mark.parametrize("name", NETS)
def test_checkpoints_written_and_read_draft_the_same(tmp_path, name, format):
    drafter = NETS[name]()
    drafter.save_pretrained(tmp_path, format, target=target())
    assert_same_drafts(type(drafter).from_pretrained(tmp_path, target()), drafter)


@pytest.mark.parametrize("kind", ["full", "sliding causal", "sliding"])
@pytest.mark.parametrize("method", ["dflash", "dspark"])
def test_logits_are_those_of_the_library_that_trains_such_drafts(tmp_path, method, kind):
    pytest.importorskip("speculators")
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig

    made, cls, drafter = {
        "dflash": (DFlashSpeculatorConfig, DFlashDraftModel, DFlashDrafter),
        "dspark": (DSparkSpeculatorConfig, DSparkDraftModel, DSparkDrafter),
    }[method]
    model, kinds = target(20), "sliding_attention" if "sliding" in kind else "full_attention"
    layers = {
        **SIZES,
        "num_hidden_layers": 2,
        "vocab_size": 20,
        "layer_types": ["full_attention", kinds],
        "sliding_window": 50,
    }
    layers["use_sliding_window"] = True
    config = made(
        transformer_layer_config=Qwen3Config(**layers, attn_implementation="eager"), draft_vocab_size=20, block_size=4,
        aux_hidden_state_layer_ids=[0, 2], mask_token_id=3, sliding_window_non_causal=kind == "sliding",
        **({"markov_rank": 5, "markov_head_type": "gated"} if method == "dspark" else {}),
    )  # fmt: skip
    theirs = drawn(cls(config))
    theirs.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight)
    theirs.lm_head.weight.data.copy_(model.lm_head.weight)
    theirs.save_pretrained(tmp_path)
    text = torch.randint(20, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = model(text, output_hidden_states=True).hidden_states
        hidden, logits, *_, index = theirs._backbone_forward(
            torch.cat([states[0], states[2]], -1),
            text,
            torch.ones(1, 30),
            states[2],
            torch.zeros(1, 30).long(),
            max_anchors=5,
        )
    read = drafter.from_pretrained(tmp_path, model)
    computed = heard(read.net)
    for place, (expected, slots) in enumerate(zip(logits[0].split(4), hidden[0].split(4), strict=True)):
        anchor = int(index[4 * place])
        specdec.generate(model, text[0, : anchor + 1], read, max_new_tokens=5, stop_tokens=())
        found = computed[0]
        computed.clear()
        first = 4 - read.net.depth
        assert torch.allclose(found.logits[0], expected[first:], atol=NORMS)
        if method == "dspark":
            tokens = torch.arange(7, 11)[None]
            bias = theirs.markov_head.block_bias(prev_token_ids=tokens, hidden_states=slots[None])
            assert torch.allclose(read.net.logits(found, tokens), expected + bias, atol=NORMS)
            both = torch.cat([slots, theirs.markov_head.prev_embeddings(tokens[0])], -1)
            sure = theirs.confidence_head(both).sigmoid()
            assert torch.allclose(read.net.confidence(found, tokens)[0], sure, atol=NORMS)
    model.save_pretrained(tmp_path / "target")
    model.config._name_or_path = str(tmp_path / "target")  # as if read from there
    read.save_pretrained(tmp_path / "again", "speculators", target=model)
    again = cls.from_pretrained(tmp_path / "again")
    assert again.config.aux_hidden_state_layer_ids == [0, 2] and again.config.block_size == 4
    assert all(torch.equal(tensor, again.state_dict()[name].double()) for name, tensor in read.net.state_dict().items())


def write(folder, net, **config):
    """A checkpoint with the tensors of a network and this config, beside what all layouts hold of layers."""
    layers = {**SIZES, "num_hidden_layers": 2, "vocab_size": 4, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    config = config if "transformer_layer_config" in config else {**layers, "model_type": "qwen3", **config}
    tensors = {name: tensor for name, tensor in net.state_dict().items() if name != "target_ids"}
    write_checkpoint(folder, config, tensors | config.pop("more", {}))
    return folder


Z_LAB = {"architectures": ["DFlashDraftModel"], "block_size": 3, "num_target_layers": 3}
Z_LAB["dflash_config"] = {"mask_token_id": 3, "target_layer_ids": [0, 2]}
DEEP_SPEC = {"architectures": ["Qwen3DSparkModel"], "block_size": 2, "target_layer_ids": [0, 2], "mask_token_id": 3,
             "markov_rank": 3, "markov_head_type": "vanilla", "enable_confidence_head": True, "num_anchors": 512}  # fmt: skip


def test_files_of_z_lab_and_deep_spec_are_read(tmp_path):
    z_lab, copies = dflash(states=(1, -1)), target().state_dict()
    read = DFlashDrafter.from_pretrained(write(tmp_path / "z", z_lab, **Z_LAB), target())
    assert (read.states, read.net.depth) == ((1, -1), 2)
    assert_same_drafts(read, DFlashDrafter(z_lab))
    read = DFlashDrafter.from_pretrained(tmp_path / "z", target(), states=(0, 1), sample_from_anchor=True)
    assert (read.states, read.net.depth) == ((0, 1), 3)

    deep_spec = dspark(confident=True)
    copies = {"embed_tokens.weight": copies["model.embed_tokens.weight"], "lm_head.weight": copies["lm_head.weight"]}
    folder = write(tmp_path / "d", deep_spec, more=copies, **DEEP_SPEC)
    read = DSparkDrafter.from_pretrained(folder, target(), confidence=0.4)
    assert read.net.embed_tokens is None and read.net.lm_head is None  # the target's, not two copies
    assert_same_drafts(read, DSparkDrafter(deep_spec, confidence=0.4))


def test_drafts_of_dsparks_architecture_without_its_heads_are_dflash(tmp_path):
    net = dflash(2, states=(1, -1), reading=BlockReading(from_anchor=True))
    write(tmp_path, net, **{**DEEP_SPEC, "markov_rank": 0, "enable_confidence_head": False})
    for cls in (DFlashDrafter, DSparkDrafter):
        assert_same_drafts(cls.from_pretrained(tmp_path, target()), DFlashDrafter(net))


def test_scales_and_bounds_of_logits_are_read_and_written(tmp_path):
    net, scaled = dflash(states=(1, -1)), BlockReading(logit_scale=0.5, logit_cap=0.3)
    given = {"output_multiplier": 0.5, "final_logit_softcapping": 0.3}
    write(tmp_path, net, **{**Z_LAB, "dflash_config": {**Z_LAB["dflash_config"], **given}})
    read = DFlashDrafter.from_pretrained(tmp_path, target())
    found = heard(read.net)
    with torch.inference_mode():
        drafts(read, PROMPTS[:1])
        expected = (plain_block(net, target(), PROMPTS[0]) * 0.5 / 0.3).tanh() * 0.3
    assert torch.allclose(found[0].logits[0], expected, atol=NORMS)
    other = DFlashDrafter(dflash(reading=replace(scaled, embedding_scale=2.0)))
    other.save_pretrained(tmp_path, target=target())
    assert_same_drafts(DFlashDrafter.from_pretrained(tmp_path, target()), other)


def test_embeddings_of_the_drafts_own_are_kept(tmp_path):
    own = {"embed_tokens.weight": torch.randn(4, 16, dtype=torch.float64)}
    read = DFlashDrafter.from_pretrained(write(tmp_path, dflash(states=(1, -1)), more=own, **Z_LAB), target())
    assert torch.equal(read.net.embed_tokens.weight, own["embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["DFlash2DraftModel"]},
            "architecture DFlash2DraftModel; what can be read is DFlashDraftModel",
        ),
        (
            {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 3]}},
            r"states \(1, 4\), and this target has layers 0 to 2",
        ),
        (
            {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [0]}},
            r"fc.weight takes 32 numbers, .* are 1 x 16",
        ),
        ({"dflash_config": {"mask_token_id": 3}}, "target_layer_ids"),
        ({"dflash_config": {"mask_token_id": 9, "target_layer_ids": [0, 2]}}, "mask_token_id=9: must be <= 3"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "must be one of"),
        ({"more": {"layers.0.extra": torch.zeros(1)}}, "layers.0.extra"),
        ({"more": {"lm_head.weight": torch.zeros(3, 16)}}, "lm_head.weight drafts 3 tokens, the target knows 4"),
        (
            {"more": {"lm_head.weight": torch.zeros(2, 16), "d2t": torch.tensor([0, 3])}},
            "ids 0 to 4, the target knows 4",
        ),
        ({"more": {"fc.weight": torch.zeros(16, 16)}}, "fc.weight takes 16 numbers, .* are 2 x 16"),
        ({"more": {"fc.weight": torch.zeros(8, 32)}}, "fc.weight has 8 rows, .* hidden size is 16"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    folder = write(tmp_path, dflash(states=(1, -1)), **{**Z_LAB, **changes})
    with pytest.raises(ValueError, match=message):
        DFlashDrafter.from_pretrained(folder, target())


def test_what_a_draft_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lacks .*self_attn.q_proj.weight"):
        write_checkpoint(
            tmp_path, Z_LAB, {"fc.weight": torch.zeros(16, 32), "layers.0.self_attn.k_proj.weight": torch.zeros(1)}
        )
        DFlashDrafter.from_pretrained(tmp_path, target())
    with pytest.raises(ValueError, match="is a dspark checkpoint; read it with DSparkDrafter"):
        DFlashDrafter.from_pretrained(write(tmp_path / "dspark", dspark(), **DEEP_SPEC), target())
    with pytest.raises(ValueError, match="is a dflash checkpoint; read it with DFlashDrafter"):
        DSparkDrafter.from_pretrained(write(tmp_path / "dflash", dflash(), **Z_LAB), target())
    with pytest.raises(ValueError, match="Markov head of type rnn cannot be read"):
        folder = write(tmp_path / "rnn", dspark(), **{**DEEP_SPEC, "markov_head_type": "rnn"})
        DSparkDrafter.from_pretrained(folder, target())
    with pytest.raises(ValueError, match=r"confidence=0.3: the network has no confidence head"):
        DSparkDrafter(dspark(), confidence=0.3)
    with pytest.raises(ValueError, match=r"confidence=2: must be in \[0, 1\]"):
        DSparkDrafter(dspark(confident=True), confidence=2)
    with pytest.raises(ValueError, match="at most 2 tokens, not 3"):
        specdec.generate(target(), PROMPTS, DFlashDrafter(dflash(), Chain(3)))
    with pytest.raises(ValueError, match="write this draft as format='plain'"):
        DFlashDrafter(dflash(states=(1, -1))).save_pretrained(tmp_path / "s", "speculators", target=target())
    with pytest.raises(ValueError, match="format='onnx': must be 'plain' or 'speculators'"):
        DFlashDrafter(dflash()).save_pretrained(tmp_path / "s", "onnx", target=target())


LAYERS = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "rope_parameters", "rope_theta", "vocab_size",
          "max_position_embeddings", "tie_word_embeddings", "layer_types", "use_sliding_window", "sliding_window"}  # fmt: skip
TOP = {"architectures", "dtype", "block_size", "sample_from_anchor", "draft_vocab_size"}
MARKOV = {"markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"}
ATTENTION = [f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
LAYER = [*ATTENTION, *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
         "input_layernorm.weight", "post_attention_layernorm.weight"]  # fmt: skip


def test_files_hold_what_engines_read(tmp_path):
    dflash_net, dspark_net = reduced(dflash(vocab=3)), dspark(states=(0, 2), confident=True)
    for format in ("plain", "speculators"):
        DFlashDrafter(dflash_net).save_pretrained(tmp_path / "dflash" / format, format, target=target())
        DSparkDrafter(dspark_net).save_pretrained(tmp_path / "dspark" / format, format, target=target())

    def keys(*folder):
        return json.loads(tmp_path.joinpath(*folder, "config.json").read_text())

    plain, nested = keys("dflash", "plain"), {"mask_token_id": 3, "target_layer_ids": [-1, 1], "causal": False}
    assert {*plain} == TOP | LAYERS | {"num_target_layers", "dflash_config"}
    assert (plain["architectures"], plain["dflash_config"], plain["draft_vocab_size"]) == (
        ["DFlashDraftModel"],
        nested,
        3,
    )
    plain = keys("dspark", "plain")
    assert {*plain} == TOP | LAYERS | MARKOV | {"num_target_layers", "mask_token_id", "target_layer_ids"}
    assert (plain["architectures"], plain["target_layer_ids"]) == (["Qwen3DSparkModel"], [-1, 1])
    other = keys("dspark", "speculators")
    assert {*other["transformer_layer_config"]} == LAYERS and other["aux_hidden_state_layer_ids"] == [0, 2]
    assert {*other} == TOP | MARKOV | {"speculators_model_type", "speculators_version", "speculators_config",
                                       "transformer_layer_config", "aux_hidden_state_layer_ids", "mask_token_id",
                                       "sliding_window_non_causal"}  # fmt: skip
    backbone = {f"layers.{i}.{name}" for i in range(2) for name in LAYER} | {
        "fc.weight",
        "hidden_norm.weight",
        "norm.weight",
    }
    assert {*load_file(tmp_path / "dflash/plain/model.safetensors")} == backbone | {"lm_head.weight", "d2t", "t2d"}
    assert {*load_file(tmp_path / "dspark/plain/model.safetensors")} == backbone | {
        "markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "confidence_head.proj.weight",
        "confidence_head.proj.bias"}  # fmt: skip
