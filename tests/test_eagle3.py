"""EAGLE drafts: the files of all tools that write them give the same network, and are written as engines read them."""

import dataclasses
import json

import eagle_files as files
import pytest
import torch
from eagle_files import HIDDEN, KNOWN, VOCAB, Page, target, tensors
from safetensors.torch import load_file, save_file
from tiny_models import PROMPTS, reference
from transformers import AutoModelForCausalLM

import specdec
from specdec import Sampling
from specdec.drafters import Eagle3Drafter, EagleDrafter
from specdec.drafters.states_drafter import TargetParts
from specdec.testing import exact_law, target_law
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
TEXT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def model():
    return target()


@torch.no_grad()
def logits(net, model, text=TEXT, seed=1):
    """[n, known]: for the pairs of a page of text with random states."""
    states = page_states(net, text, seed)
    parts = TargetParts.of(model)
    return net.logits(net.follow(text, states, Page(text.shape[1]), parts), parts)[0]


def page_states(net, text=TEXT, seed=1):
    generator, count = torch.Generator().manual_seed(seed), len(net.states)
    return torch.randn(*text.shape, count, net.state_size, generator=generator, dtype=torch.float64)


LAYOUTS = {
    "official": files.official,
    "specforge": files.specforge,
    "optimizer": files.optimizer,
    "speculators": lambda folder, found: files.speculators(folder, found, norm_before_residual=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_authors_network(tmp_path, model, layout):
    found = tensors()
    net = Eagle3Drafter.from_pretrained(LAYOUTS[layout](tmp_path, found), model).net
    assert net.states == (2, 3, 4)
    assert net.target_ids.tolist() == KNOWN
    with torch.no_grad():
        wanted = files.expected(found, TEXT[0], page_states(net)[0])
    assert torch.allclose(logits(net, model), wanted, atol=1e-5)  # angles are computed in float32
    assert wanted.std() > 1


def test_a_folder_of_several_files_and_one_without_the_embedding_are_read(tmp_path, model):
    found = tensors()
    whole = Eagle3Drafter.from_pretrained(files.specforge(tmp_path / "whole", found), model).net
    folder = files.specforge(tmp_path / "parts", {})
    (folder / "model.safetensors").unlink()
    parts = {f"model-{i}-of-2.safetensors": dict(list(found.items())[i::2]) for i in range(2)}
    for file, part in parts.items():
        save_file(part, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(Eagle3Drafter.from_pretrained(folder, model).net, model), logits(whole, model))
    (folder / "model-1-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match="no model-1-of-2"):
        Eagle3Drafter.from_pretrained(folder, model)

    copied = {**found, "embed_tokens.weight": model.get_input_embeddings().weight.detach()}
    net = Eagle3Drafter.from_pretrained(files.specforge(tmp_path / "copied", copied), model).net
    del copied["embed_tokens.weight"]
    bare = Eagle3Drafter.from_pretrained(files.specforge(tmp_path / "bare", copied), model).net
    assert net.embed_tokens is None, "a copy of the target's embedding is kept twice"
    assert torch.equal(logits(net, model), logits(bare, model))
    assert not torch.equal(logits(net, model), logits(whole, model))


def test_the_key_decides_how_layers_are_counted(tmp_path, model):
    found, ids = tensors(states=2), "eagle_aux_hidden_state_layer_ids"
    cases = [
        ({ids: [1, 5]}, (1, 5)),
        ({"eagle_config": {ids: [1, 5]}}, (2, 6)),
        ({ids: [1, 5], "eagle_config": {ids: [0, 4]}}, (1, 5)),
        ({"target_layer_ids": [1, 5]}, (2, 6)),
        ({"aux_hidden_state_layer_ids": [1, 5]}, (1, 5)),
    ]
    for i, (keys, states) in enumerate(cases):
        folder = files.specforge(tmp_path / str(i), found, **keys)
        drafter = Eagle3Drafter.from_pretrained(folder, model)
        assert drafter.states == drafter.net.states == states
        assert Eagle3Drafter.from_pretrained(folder, model, states=(3, -1)).states == (3, -1)


def test_a_reading_that_the_file_does_not_say_is_that_of_its_format(tmp_path, model):
    found, switched = tensors(), {"norm_before_residual": True, "norm_output": True}
    plain, other = files.specforge(tmp_path / "plain", found), files.speculators(tmp_path / "other", found)
    said = files.specforge(tmp_path / "said", found, **switched)
    for folder, keys, reading in (
        (plain, {}, (False, False)),
        (other, {}, (True, False)),
        (said, {}, (True, True)),
        (said, {"norm_output": False}, (True, False)),
        (other, {"norm_before_residual": False}, (False, False)),
    ):
        net = Eagle3Drafter.from_pretrained(folder, model, **keys).net
        assert dataclasses.astuple(net.reading) == reading
        with torch.no_grad():
            wanted = files.expected(found, TEXT[0], page_states(net)[0], norm_before_residual=reading[0])
        assert torch.allclose(logits(net, model), wanted, atol=1e-5)  # norm_output changes only what comes next


def test_positions_are_those_of_the_draft_and_of_any_text(tmp_path, model):
    """Not those of the target, and without the limit of 2048 that many files copy."""
    found, text = tensors(), torch.arange(24)[None] % VOCAB  # its limit is 8
    for theta, keys in (
        (1e4, {"rope_theta": None}),
        (50.0, {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ):
        net = Eagle3Drafter.from_pretrained(files.specforge(tmp_path / str(theta), found, **keys), model).net
        with torch.no_grad():
            wanted = files.expected(found, text[0], page_states(net, text)[0], theta)
        assert torch.allclose(logits(net, model, text), wanted, atol=1e-4)
    longer = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ValueError, match="must be of type default"):
        Eagle3Drafter.from_pretrained(files.specforge(tmp_path / "dynamic", found, rope_scaling=longer), model)


def test_frequencies_of_positions_are_not_rounded_to_the_dtype_of_the_network(tmp_path, model):
    net = Eagle3Drafter.from_pretrained(files.specforge(tmp_path, tensors()), model).net
    before = net.rotary.inv_freq.clone()
    net.bfloat16()
    assert net.rotary.inv_freq.dtype == torch.float32
    assert torch.equal(net.rotary.inv_freq, before)
    assert net.fc.weight.dtype == torch.bfloat16


BIASES = {
    f"midlayer.self_attn.{x}_proj.bias": torch.arange(8.0 * n).double()
    for x, n in (("q", 2), ("k", 1), ("v", 1), ("o", 2))
}

# What tensors of a draft tell, layout by layout: the layers of Qwen3 with five states, EAGLE-3.1, more layers, windows.
SHAPES = {
    "deepspec": lambda folder: files.deepspec(folder, tensors(5, known=None, head_norms=True)),
    "eagle_3_1": lambda folder: files.specforge(folder, tensors(norms="fc_norm"), fc_norm=True, norm_output=True),
    "norm_before_fc": lambda folder: files.specforge(folder, tensors(norms="input_norm"), norm_before_fc=True),
    "no_embedding": lambda folder: files.specforge(folder, tensors(embedding=False)),
    "no_vocabulary": lambda folder: files.specforge(folder, tensors(known=None)),
    "no_head": lambda folder: files.specforge(
        folder, {name: x for name, x in tensors(known=None).items() if name != "lm_head.weight"}
    ),
    "no_d2t": lambda folder: files.specforge(folder, {name: x for name, x in tensors().items() if name != "d2t"}),
    "qwen3_layers": lambda folder: files.speculators(
        folder, tensors(layers=2, head_norms=True), family="qwen3", norm_output=True, fc_norm=False
    ),
    "biases": lambda folder: files.specforge(folder, tensors() | BIASES),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("format", ["eagle3", "speculators"])
def test_what_is_written_is_read_as_the_same_network(tmp_path, model, name, format):
    drafter = Eagle3Drafter.from_pretrained(SHAPES[name](tmp_path / "given"), model)
    if (reason := {
        ("deepspec", "eagle3"): "norms of queries",
        ("qwen3_layers", "eagle3"): "norm_before_residual",
        ("no_head", "speculators"): "LM head",
    }.get((name, format))):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            drafter.save_pretrained(tmp_path / "made", format, model)
        return
    drafter.save_pretrained(tmp_path / "made", format, model)
    again = Eagle3Drafter.from_pretrained(tmp_path / "made", model)
    assert again.states == drafter.states
    assert again.net.reading == drafter.net.reading
    assert torch.equal(logits(again.net, model), logits(drafter.net, model))
    assert again.net.state_dict().keys() == drafter.net.state_dict().keys()
    assert all(torch.equal(x, again.net.state_dict()[key]) for key, x in drafter.net.state_dict().items())


def test_norms_before_the_projection_and_on_queries_are_computed(tmp_path, model):
    """Against the authors' network, whose tensors make these norms do nothing, or what is done by hand."""
    base = tensors()
    states = torch.randn(1, 8, 3, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, normed in (
        ("fc_norm", torch.nn.functional.rms_norm(states, (HIDDEN,), eps=1e-5)),
        ("input_norm", torch.nn.functional.rms_norm(states.flatten(2), (3 * HIDDEN,), eps=1e-5).view_as(states)),
    ):
        ones = {k: torch.ones_like(x) for k, x in tensors(norms=name).items() if name in k}
        net = Eagle3Drafter.from_pretrained(files.specforge(tmp_path / name, base | ones), model).net
        with torch.no_grad():
            wanted = files.expected(base, TEXT[0], normed[0])
        assert torch.allclose(logits(net, model), wanted, atol=1e-5)
    found = tensors(head_norms=True)
    net = Eagle3Drafter.from_pretrained(
        files.speculators(tmp_path / "heads", found, norm_before_residual=False), model
    ).net
    with torch.no_grad():
        wanted = files.expected(found, TEXT[0], states[0])
    assert torch.allclose(logits(net, model), wanted, atol=1e-5)


def test_a_layer_with_a_window_sees_no_further(tmp_path, model):
    folder = files.speculators(tmp_path, tensors())
    config = json.loads((folder / "config.json").read_text())
    config["transformer_layer_config"] |= {"layer_types": ["sliding_attention"], "sliding_window": 3}
    (folder / "config.json").write_text(json.dumps(config))
    net = Eagle3Drafter.from_pretrained(folder, model).net
    with torch.no_grad():
        parts, states = TargetParts.of(model), page_states(net)
        last = net.follow(TEXT[:, -3:], states[:, -3:], Page(3, first=5), parts)
        assert torch.allclose(net.follow(TEXT, states, Page(8), parts)[:, -1], last[:, -1])


@pytest.mark.parametrize("tree", [Chain(3), Widths((3, 2, 1))], ids=str)
def test_greedy_text_equals_transformers_generate(tmp_path, tree):
    model, prompts = target(vocab_size=50), [PROMPTS[0], PROMPTS[2]]
    folder = files.specforge(tmp_path, tensors(vocab=50, known=list(range(3, 43, 2))))
    out = specdec.generate(
        model, prompts, Eagle3Drafter.from_pretrained(folder, model, tree), max_new_tokens=12, stop_tokens=()
    )
    assert [t.tolist() for t in out.tokens] == [reference(model, p, max_new_tokens=12).tolist() for p in prompts]


def test_a_draft_that_knows_half_of_the_tokens_keeps_the_law_of_the_text(tmp_path):
    model = target(vocab_size=4, num_hidden_layers=2)
    folder = files.specforge(tmp_path, tensors(2, vocab=4, known=[1, 3]), norm_output=True)
    drafter = Eagle3Drafter.from_pretrained(folder, model, Widths((2, 1)), states=(0, 1))
    options = {"sampling": Sampling(1.0), "max_new_tokens": 3}
    law = exact_law(model, (0, 1, 2), drafter, **options)
    assert float(law.total_variation(target_law(model, (0, 1, 2), **options))) <= 1e-12
    assert law.expected_tokens > 1.2, "hardly a draft is accepted"


def test_an_eagle1_file_is_read_and_its_drafts_leave_the_text_alone(tmp_path, model):
    found = files.eagle1()
    folder = files.official(tmp_path / "new", found, rope_theta=None)
    drafter = EagleDrafter.from_pretrained(folder, model, Widths((2, 2)))
    with torch.no_grad():
        x = (
            torch.cat([found["embed_tokens.weight"][TEXT[0]], page_states(drafter.net)[0, :, 0]], -1)
            @ found["fc.weight"].T
        )
        x = x + found["fc.bias"]
        part = {name.removeprefix("layers.0."): tensor for name, tensor in found.items()}
        x = x + files.attention(x, part, 1e4)
        wanted = (x + files.feed_forward(x, part)) @ model.lm_head.weight.T
    assert torch.allclose(logits(drafter.net, model), wanted, atol=1e-5)
    other = EagleDrafter.from_pretrained(files.official(tmp_path / "old", files.eagle1(bias=False)), model)
    assert not torch.allclose(logits(other.net, model), wanted, atol=1e-2)
    out = specdec.generate(model, [PROMPTS[0], PROMPTS[3]], drafter, max_new_tokens=10, stop_tokens=())
    alone = specdec.generate(model, [PROMPTS[0], PROMPTS[3]], max_new_tokens=10, stop_tokens=())
    assert [t.tolist() for t in out.tokens] == [t.tolist() for t in alone.tokens]
    with pytest.raises(ValueError, match=r"EAGLE-1 or EAGLE-2; use EagleDrafter.from_pretrained"):
        Eagle3Drafter.from_pretrained(folder, model)
    with pytest.raises(ValueError, match="is it an EAGLE-3 draft"):
        EagleDrafter.from_pretrained(files.official(tmp_path / "eagle3", tensors()), model)


class Code:
    def __reduce__(self):
        return (print, ("run",))


def without(*names):
    return {name: tensor for name, tensor in tensors().items() if name not in names}


def changed(name, value):
    return {**tensors(), name: value}


BROKEN = {
    "another_size": (dict(found=tensors(state_size=32)), "fc.weight takes 96 numbers, and states .* are 3 x 16"),
    "number_of_states": (dict(found=tensors(5)), "fc.weight takes 80 numbers, .* pass states="),
    "vocabulary": (dict(found=tensors(known=None, vocab=20)), "lm_head.weight drafts 20 tokens, the target knows 12"),
    "embedding": (dict(found=changed("embed_tokens.weight", torch.ones(20, HIDDEN))), "embed_tokens.weight knows 20 tokens"),
    "marks": (dict(found=changed("t2d", torch.ones(20, dtype=torch.bool))), "t2d marks tokens of 20"),
    "missing": (dict(found=without("norm.weight", "midlayer.mlp.up_proj.weight")), r"lacks layers.0.mlp.up_proj.weight, norm"),
    "no_fc": (dict(found=without("fc.weight")), r"lacks fc.weight"),
    "no_head": (dict(found=without("lm_head.weight")), r"lm_head.weight is not there"),
    "unexpected": (dict(found=changed("extra.weight", torch.ones(2))), r"has extra.weight besides"),
    "shape": (dict(found=changed("norm.weight", torch.ones(8))), r"norm.weight is \[8\], and \[16\] goes with"),
    "no_norm": (dict(found=tensors(), norm_before_fc=True), r"lacks input_norm.weight"),
    "out_of_range": (dict(found=changed("d2t", torch.full((6,), 9))), "leads to ids 9 to 14, the target knows 12"),
    "twice": (dict(found=changed("d2t", torch.tensor([1, 0, 0, 0, 0, 0]))), "leads twice to id 1"),
    "not_as_many": (dict(found=changed("d2t", torch.tensor([1, 0]))), "knows 2 tokens, and lm_head.weight drafts 6"),
    "layers": (dict(found=tensors(), eagle_aux_hidden_state_layer_ids=[2, 16, 29]), "target has layers 0 to 6"),
    "another_kind": (dict(found=tensors(), speculators_model_type="dflash"), "speculators_model_type is 'dflash'"),
    "gemma": (dict(found=tensors(), model_type="gemma3_text"), "layers of Llama or Qwen3"),
    "heads": (dict(found=tensors(), head_dim=5), "head_dim=5 divides no q_proj of 16 rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_refused_with_what_was_found_and_what_is_needed(tmp_path, model, name):
    given, message = BROKEN[name]
    folder = files.specforge(tmp_path / "draft", **given)
    with pytest.raises(ValueError, match=message) as error:
        Eagle3Drafter.from_pretrained(folder, model)
    assert str(folder) in str(error.value)


def test_folders_without_a_draft_are_refused_and_no_code_in_them_is_run(tmp_path, model, capsys):
    with pytest.raises(ValueError, match=r"There is no config.json in"):
        Eagle3Drafter.from_pretrained(tmp_path, model)
    folder = files.specforge(tmp_path / "draft", {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor pytorch_model.bin in"):
        Eagle3Drafter.from_pretrained(folder, model)
    torch.save({**tensors(), "extra": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        Eagle3Drafter.from_pretrained(folder, model)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        Eagle3Drafter.from_pretrained(tmp_path / "draught", model)
    with pytest.raises(ValueError, match="pass the model that it drafts for"):
        Eagle3Drafter.from_pretrained(folder, "llama")


# As vLLM 0.33, SGLang 0.5.23, TensorRT-LLM and SpecForge 0.2 read a plain EAGLE-3 draft
PLAIN_KEYS = """
    architectures attention_bias bos_token_id draft_vocab_size eagle_aux_hidden_state_layer_ids eagle_config
    eos_token_id fc_norm head_dim hidden_act hidden_size intermediate_size max_position_embeddings model_type
    norm_before_fc norm_before_residual norm_output num_attention_heads num_hidden_layers num_key_value_heads
    rms_norm_eps rope_parameters rope_theta tie_word_embeddings torch_dtype vocab_size
"""
PLAIN_TENSORS = {
    "d2t": [6], "t2d": [12], "embed_tokens.weight": [12, 16], "lm_head.weight": [6, 16], "fc.weight": [16, 48],
    "norm.weight": [16],
    "midlayer.self_attn.q_proj.weight": [16, 32], "midlayer.self_attn.k_proj.weight": [8, 32],
    "midlayer.self_attn.v_proj.weight": [8, 32], "midlayer.self_attn.o_proj.weight": [16, 16],
    "midlayer.mlp.gate_proj.weight": [24, 16], "midlayer.mlp.up_proj.weight": [24, 16],
    "midlayer.mlp.down_proj.weight": [16, 24],
    "midlayer.hidden_norm.weight": [16], "midlayer.input_layernorm.weight": [16],
    "midlayer.post_attention_layernorm.weight": [16],
}  # fmt: skip
# As speculators 0.9 and vLLM read theirs
THEIR_KEYS = """
    architectures draft_vocab_size dtype eagle_aux_hidden_state_layer_ids embed_requires_grad fc_norm norm_before_fc
    norm_before_residual norm_output speculators_config speculators_model_type speculators_version target_hidden_size
    transformer_layer_config
"""
THEIR_TENSORS = {name.replace("midlayer", "layers.0"): shape for name, shape in PLAIN_TENSORS.items()}


def test_files_are_written_as_engines_read_them(tmp_path, model):
    given = files.specforge(tmp_path / "given", tensors(), eagle_aux_hidden_state_layer_ids=[1, 3, 6])
    drafter = Eagle3Drafter.from_pretrained(given, model)
    for format, keys, shapes in (("eagle3", PLAIN_KEYS, PLAIN_TENSORS), ("speculators", THEIR_KEYS, THEIR_TENSORS)):
        drafter.save_pretrained(tmp_path / format, format, target=model)
        config = json.loads((tmp_path / format / "config.json").read_text())
        found = load_file(tmp_path / format / "model.safetensors")
        assert {name: list(tensor.shape) for name, tensor in found.items()} == shapes
        assert sorted(config) == keys.split()
        assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
        assert (found["d2t"].dtype, found["t2d"].dtype) == (torch.int64, torch.bool)
        assert torch.equal(found["d2t"], tensors()["d2t"])
        assert torch.equal(found["t2d"], tensors()["t2d"])
        layer = config.get("transformer_layer_config", config)
        assert (layer["vocab_size"], config["draft_vocab_size"], layer["rope_parameters"]["rope_theta"]) == (
            12,
            6,
            500.0,
        )
        assert layer["max_position_embeddings"] == 256, "a limit of the draft below that of the target cuts texts off"
    plain = json.loads((tmp_path / "eagle3" / "config.json").read_text())
    assert plain["architectures"] == ["LlamaForCausalLMEagle3"]
    assert plain["eagle_config"] == {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 2, 5]}
    assert config["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]
    usual = Eagle3Drafter.from_pretrained(files.specforge(tmp_path / "usual", tensors()), model)
    usual.save_pretrained(tmp_path / "default", target=model)
    config = json.loads((tmp_path / "default" / "config.json").read_text())
    assert not {"eagle_config", "eagle_aux_hidden_state_layer_ids"} & {*config}, "engines count the usual states alike"


def test_what_a_format_cannot_say_is_refused_with_the_reason(tmp_path, model):
    def refused(reason, format, found, states=None, **keys):
        drafter = Eagle3Drafter.from_pretrained(
            files.specforge(tmp_path / "given", found, **keys), model, states=states
        )
        with pytest.raises(ValueError, match=reason):
            drafter.save_pretrained(tmp_path / "made", format, model)
        assert not (tmp_path / "made").exists()

    refused("states after layers", "eagle3", tensors(), states=(0, 2, 3))
    refused("SGLang does not know norm_before_residual", "eagle3", tensors(), norm_before_residual=True)
    refused("read one layer, not 2", "eagle3", tensors(layers=2))
    for format in ("eagle3", "speculators"):
        refused("hold -1, which is before no layer", format, tensors(), states=(2, 3, -1))
    refused("must be 'eagle3' or 'speculators'", "medusa", tensors())
    drafter = Eagle3Drafter.from_pretrained(files.specforge(tmp_path / "given", tensors()), model)
    with pytest.raises(ValueError, match="pass target="):
        drafter.save_pretrained(tmp_path / "made", "speculators")
    drafter.net.config.vocab_size = 32000
    with pytest.raises(ValueError, match="must be how many tokens the target knows"):
        drafter.save_pretrained(tmp_path / "made")


@pytest.mark.filterwarnings("ignore")  # that package's own
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("switched", [False, True])
def test_the_module_of_speculators_gives_the_same_logits_along_a_chain(tmp_path, model, family, switched):
    peer = pytest.importorskip("speculators.models.eagle3")
    shape = {"head_norms": family == "qwen3", "layers": 1 + switched, "norms": "fc_norm" if switched else "input_norm"}
    keys = {"norm_output": switched, "norm_before_residual": switched}
    given = files.speculators(tmp_path / "given", tensors(**shape), family=family, **keys)
    ours = Eagle3Drafter.from_pretrained(given, model)
    model.save_pretrained(tmp_path / "target")
    ours.save_pretrained(tmp_path / "made", "speculators", AutoModelForCausalLM.from_pretrained(tmp_path / "target"))
    config = peer.Eagle3SpeculatorConfig.from_pretrained(tmp_path / "made")
    config.transformer_layer_config._attn_implementation = "eager"
    theirs = peer.Eagle3DraftModel.from_pretrained(tmp_path / "made", config=config, dtype=torch.float64).eval()
    text = torch.arange(64)[None] * 7 % VOCAB
    found, states, parts = [], page_states(ours.net, text), TargetParts.of(model)
    theirs.lm_head.register_forward_hook(lambda module, given, logits: found.append(logits[0]))
    with torch.no_grad():
        theirs(states.flatten(2), text, torch.zeros_like(text), ttt_steps=3)
        features = ours.net.project(states)
        outputs = ours.net.step(text, features, Page(64), parts)
        worst = (ours.net.logits(outputs, parts)[0] - found[0]).abs().max()
        for row in (0, 30, 61):  # two drafts after a beginning of the text; each reads the output before it
            features_here, output = features[:, : row + 1], outputs[:, row : row + 1]
            for depth in (1, 2):
                features_here = torch.cat([features_here, output], 1)
                count = row + 1 + depth
                output = ours.net.step(text[:, :count], features_here, Page(count), parts)[:, -1:]
                worst = max(worst, (ours.net.logits(output, parts)[0, 0] - found[depth][row]).abs().max())
    size = found[0].std()
    print(f"{family}, EAGLE-3{'.1' * switched}: logits of size {float(size):.1f} differ by {float(worst):.1e} at most")
    assert worst < 1e-5 * size  # norms are computed in float32
