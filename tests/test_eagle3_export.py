"""EAGLE-3 drafts are written as engines read them, and read again as the same networks."""

import json

import eagle_files as files
import pytest
import torch
from eagle_files import VOCAB, logits, page, page_states, target, tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from specdec.drafters import Eagle3Drafter
from specdec.drafters.states_net import TargetParts

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return target()


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


def test_the_script_writes_a_draft_and_the_commands_that_serve_it(tmp_path, model, run):
    model.save_pretrained(tmp_path / "target")
    draft = files.specforge(tmp_path / "draft", tensors())
    out, ended = run(str(tmp_path / "target"), str(draft), str(tmp_path / "made"), script="export.py")
    assert ended is None
    made = tmp_path / "made"
    assert (made / "serve.txt").read_text() in out
    for part in (
        f"vllm serve {tmp_path / 'target'} --speculative-config '" + '{"method": "eagle3", "model": "' + f'{made}"',
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {made} --speculative-num-steps 3",
        f"trtllm-serve {tmp_path / 'target'} --extra_llm_api_options {made / 'trtllm.yaml'}",
    ):
        assert part in out
    settings = json.loads((made / "trtllm.yaml").read_text())["speculative_config"]
    assert settings["eagle3_layers_to_capture"] == [1, 2, 3]  # of the states before layers 2, 3 and 4
    assert Eagle3Drafter.from_pretrained(made, model).states == (2, 3, 4)
    out, _ = run(*map(str, (tmp_path / "target", draft, made, "--format", "speculators")), script="export.py")
    assert f"vllm serve {made}\n" in out


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
    found, states, parts = [], page_states(ours.net, text), TargetParts.of(model, ours.net)
    theirs.lm_head.register_forward_hook(lambda module, given, logits: found.append(logits[0]))
    with torch.no_grad():
        theirs(states.flatten(2), text, torch.zeros_like(text), ttt_steps=3)
        features = ours.net.project(states)
        outputs = ours.net.step(text, features, page(64), parts)
        worst = (ours.net.logits(outputs, parts)[0] - found[0]).abs().max()
        for row in (0, 30, 61):  # two drafts after a beginning of the text; each reads the output before it
            features_here, output = features[:, : row + 1], outputs[:, row : row + 1]
            for depth in (1, 2):
                features_here = torch.cat([features_here, output], 1)
                count = row + 1 + depth
                output = ours.net.step(text[:, :count], features_here, page(count), parts)[:, -1:]
                worst = max(worst, (ours.net.logits(output, parts)[0, 0] - found[depth][row]).abs().max())
    size = found[0].std()
    print(f"{family}, EAGLE-3{'.1' * switched}: logits of size {float(size):.1f} differ by {float(worst):.1e} at most")
    assert worst < 1e-5 * size  # norms are computed in float32
