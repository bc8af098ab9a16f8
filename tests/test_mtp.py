"""MTP layers: read from the target's own repository, and computed along trees as transformers computes them along texts."""

import json
from copy import deepcopy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_drafters import editing
from tiny_models import EXPERTS, build, llama, reference, state
from transformers import AutoModelForCausalLM, modeling_layers

import specdec
from specdec import Sampling
from specdec.drafters.mtp import MtpDrafter
from specdec.drafters.states_net import TargetParts
from specdec.models.attention import View
from specdec.models.cache import TreeCache
from specdec.models.layer_shapes import LayerShape, Slab
from specdec.models.level import CachedLevel
from specdec.testing import assert_drafter, exact_law, target_law
from specdec.tree import chain
from specdec.trees import Chain, Widths

pytestmark = pytest.mark.skipif(
    not hasattr(modeling_layers.MtpModel, "forward_layer"), reason="transformers 5.20 is the first with its loop apart"
)
torch.set_num_threads(1)
PROMPTS = [torch.tensor([1, 2, 3, 1, 0]), torch.tensor([3, 2]), torch.tensor([2, 2, 0, 1, 3, 1, 1, 0, 2])]
HIDDEN = 16
SIZES = {"vocab_size": 4, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": None,
         "pad_token_id": None}  # fmt: skip
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4, "v_head_dim": 6}
MOE = {"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
       "first_k_dense_replace": 1}  # fmt: skip
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
         "layer_types": ["linear_attention", "full_attention", "full_attention"]}  # fmt: skip
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SLIDING = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 3}
FAMILIES = {
    "DeepseekV3": {**SIZES, **MLA, **MOE},
    "Glm4Moe": {**SIZES, **MOE},
    "Glm4MoeLite": {**SIZES, **MLA, **MOE, **SPARSE},
    "Mellum": {**SIZES, **SLIDING, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 8, "num_mtp_layers": 1},
    "Qwen3": SIZES,
    "Qwen3_5": {**SIZES, **DELTA},
}
ROUNDED_INSIDE = {"Qwen3_5": 1e-6}  # transformers' gated delta rule computes in float32
BEHIND = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm", "mtp_block.": ""}
APART = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm",
         "mtp_block.": "layers.0."}  # fmt: skip
NAMINGS = {"Mellum": APART, "Qwen3": APART, "Qwen3_5": APART, "Qwen3Next": APART}  # others have BEHIND


def own_parts(seed=1):
    """The weights of an MTP layer beside those of its decoder layer."""
    made = torch.Generator().manual_seed(seed)
    shapes = {"enorm": (HIDDEN,), "hnorm": (HIDDEN,), "eh_proj": (HIDDEN, 2 * HIDDEN), "post_norm": (HIDDEN,)}
    return {name: torch.randn(shape, generator=made, dtype=torch.float64) for name, shape in shapes.items()}


def published(folder, kind, config, edit=lambda tensors: None):
    """(a target loaded from a repository with MTP weights, the decoder layer among these).

    The last layer of a model of three is saved as the decoder layer of the MTP layer of a target of two.
    """
    whole, naming = build(kind, torch.float64, **config), NAMINGS.get(kind, BEHIND)
    for weight in whole.parameters():
        if weight.dim() == 1:  # of a norm: if all are 1, a normed state cannot be told from another
            weight.data.uniform_(0.5, 1.5)
    whole.save_pretrained(folder)
    prefix, file = "model.layers.2." if naming is BEHIND else "mtp.", folder / "model.safetensors"
    block = prefix + naming["mtp_block."]
    tensors = {name.replace("model.layers.2.", block): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"{prefix}{naming[name]}.weight": tensor for name, tensor in own_parts().items()}
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    lists = {name: written[name][:2] for name in ("layer_types", "mlp_layer_types") if written.get(name)}
    (folder / "config.json").write_text(json.dumps(written | lists | {"num_hidden_layers": 2}))
    experts = {"experts_implementation": "eager"} if "num_experts_per_tok" in config else {}
    return AutoModelForCausalLM.from_pretrained(folder, **experts), whole.model.layers[2]


@pytest.fixture(autouse=True)
def quiet():
    """transformers reports the MTP weights that a target leaves out."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def transformers_own(target, block):
    """transformers' MtpModel with these weights, made without our loader."""
    main = deepcopy(target)
    main.config.num_mtp_layers = 1
    if getattr(main.config, "layer_types", None) and not getattr(main.config, "mtp_layer_types", None):
        main.config.mtp_layer_types = ["full_attention"]
    if getattr(main.config, "mlp_layer_types", None):
        main.config.mtp_mlp_layer_types = ["sparse"]
    made = modeling_layers.MtpModel(main, 1).double().eval()
    made.layers[0].mtp_block.load_state_dict(block.state_dict())
    for name, tensor in own_parts().items():
        getattr(made.layers[0], name).weight.data = tensor
    return made


@torch.inference_mode()
def teacher_forced(mtp, target, text, path):
    """[vocab]: the law after a path of drafts behind a text, recomputed whole."""
    features = target.model(text[None]).last_hidden_state[:, :-1]
    tokens = text[1:]
    for step in range(len(path) + 1):
        positions = torch.arange(1, len(tokens) + 1)[None]
        outputs = mtp.forward_layer(0, features, positions, None, input_ids=tokens[None])
        if step < len(path):
            tokens = torch.cat([tokens, path[step : step + 1]])
            features = torch.cat([features, outputs[:, -1:]], 1)
    return target.lm_head(outputs[0, -1]).softmax(-1)


def drafted(target, drafter, **options):
    """(texts, tree) of all steps of a run."""
    noted = []

    class Watched(MtpDrafter):
        def start(self, target, batch, *args):
            def note(tree):
                noted.append(([text.clone() for text in map(torch.as_tensor, batch.texts)], tree))
                return tree

            return editing(super().start(target, batch, *args), note)

    specdec.generate(target, PROMPTS, Watched(drafter.net, drafter.tree), **options)
    return noted


@pytest.mark.parametrize("kind", FAMILIES)
def test_laws_at_every_depth_are_those_of_transformers_network_over_the_whole_text(kind, tmp_path):
    target, block = published(tmp_path, kind, FAMILIES[kind])
    mtp = transformers_own(target, block)
    drafter = MtpDrafter.from_target(target, Widths((2, 1, 1)))
    compared = set()
    for texts, tree in drafted(target, drafter, sampling=Sampling(1.0), max_new_tokens=5, seed=3):
        for row, text in enumerate(texts):
            parents, paths = tree.topology.parents[row].tolist(), {-1: torch.empty(0, dtype=torch.int64)}
            for node, parent in enumerate(parents):
                paths[node] = torch.cat([paths[parent], tree.tokens[row, node][None]]) if node else paths[-1]
                if node in parents:
                    expected = teacher_forced(mtp, target, text, paths[node])
                    limit = ROUNDED_INSIDE.get(kind, 1e-9)
                    torch.testing.assert_close(tree.draft_probs[row, node], expected, rtol=limit, atol=limit)
                    compared.add((row, len(paths[node])))
    assert compared == {(row, depth) for row in range(3) for depth in range(3)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_texts_of_a_ragged_batch_are_those_of_transformers_and_the_target_is_left_as_it_was(kind, tmp_path):
    target, _ = published(tmp_path, kind, FAMILIES[kind])
    before, names = state(target), {*vars(target)}
    expected = [reference(target, prompt, max_new_tokens=12).tolist() for prompt in PROMPTS]
    for tree in (Chain(3), Widths((2, 2))):
        found = specdec.generate(target, PROMPTS, MtpDrafter.from_target(target, tree), max_new_tokens=12).tokens
        assert [text.tolist() for text in found] == expected
    assert (state(target), {*vars(target)}) == (before, names)


def test_a_latent_cache_keeps_the_contract_of_drafters_along_a_tree(tmp_path):
    target, _ = published(tmp_path, "DeepseekV3", FAMILIES["DeepseekV3"])
    drafter = MtpDrafter.from_target(target, Widths((2, 1)))
    options = {"samplings": [Sampling(1.0)], "max_new_tokens": 2, "horizon": 6}
    assert_drafter(drafter, target, PROMPTS[:2], **options, tolerance=1e-8)  # the target's router computes in float32


def test_the_law_of_the_text_is_the_target_s_along_a_chain(tmp_path):
    target, _ = published(tmp_path, "Glm4Moe", FAMILIES["Glm4Moe"])
    law = exact_law(target, (1, 2, 3), MtpDrafter.from_target(target, Chain(2)), max_new_tokens=3)
    assert law.total_variation(target_law(target, (1, 2, 3), max_new_tokens=3)) < 1e-12
    assert law.expected_tokens > 1


@torch.inference_mode()
def test_the_layer_of_qwen3_next_is_read_and_computed_by_its_own_formula(tmp_path):
    config = {**SIZES, **DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    target, block = published(tmp_path, "Qwen3Next", config)
    net = MtpDrafter.from_target(target).net
    tokens, features = PROMPTS[2][None], torch.randn(1, 9, HIDDEN, dtype=torch.float64)
    slab = Slab(*net.attention[0], torch.float64, torch.device("cpu"))
    cache, view = (
        TreeCache([LayerShape((slab, slab))], 1, 9, slab.device),
        View(torch.zeros(1, dtype=torch.int64), chain(1, 9), 9, 9),
    )
    cache.open(view)
    found = net.step(tokens, features, CachedLevel(cache, view), TargetParts.of(target, net))

    def normed(x, weight):
        short = x.float()  # as the model's own norms
        scale = (short.square().mean(-1, keepdim=True) + target.config.rms_norm_eps).rsqrt()
        return (short * scale * (1 + weight.float())).double()

    parts = own_parts()
    both = [normed(target.model.embed_tokens(tokens), parts["enorm"]), normed(features, parts["hnorm"])]
    rope = target.model.rotary_emb(features, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    out = block(torch.cat(both, -1) @ parts["eh_proj"].T, position_embeddings=rope, attention_mask=mask)
    torch.testing.assert_close(found, normed(out, parts["post_norm"]), rtol=1e-9, atol=1e-9)


def test_of_several_mtp_layers_the_first_is_used(tmp_path):
    def second(tensors):
        first = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
        tensors.update({name.replace("layers.2.", "layers.3."): torch.randn_like(t) for name, t in first.items()})

    config = FAMILIES["Glm4Moe"]
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    one, _ = published(tmp_path / "one", "Glm4Moe", config)
    two, _ = published(tmp_path / "two", "Glm4Moe", {**config, "num_mtp_layers": 2}, second)
    expected, found = (MtpDrafter.from_target(target).net.state_dict() for target in (one, two))
    assert two.config.num_mtp_layers == 2
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def without(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        del tensors[name]


PROJECTION = "model.layers.2.eh_proj.weight"
SCALES = "model.layers.2.self_attn.o_proj.weight_scale_inv"
FAULTS = {
    "no MTP weights": (without, r"holds no MTP weights, neither .*; use another drafter"),
    "a tensor missing": (lambda tensors: tensors.pop(PROJECTION), r"missing: layers\.0\.eh_proj\.weight\."),
    "another shape": (lambda tensors: tensors.update({PROJECTION: torch.zeros(HIDDEN, HIDDEN)}),
                      r"of another shape: layers\.0\.eh_proj\.weight \[16, 16\] for \[16, 32\]"),
    "quantised": (lambda tensors: tensors.update({SCALES: torch.ones(1, 1)}), r"unexpected: .*weight_scale_inv"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_refused_by_name(fault, tmp_path):
    edit, message = FAULTS[fault]
    target, _ = published(tmp_path, "Glm4Moe", FAMILIES["Glm4Moe"], edit)
    with pytest.raises(ValueError, match=message):
        MtpDrafter.from_target(target)


def test_families_and_targets_without_mtp_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM was not loaded from a repository.*from_pretrained\(name\)"):
        MtpDrafter.from_target(llama())
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no MTP weights"):
        MtpDrafter.from_target(AutoModelForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="target is a str; pass the target, as from AutoModelForCausalLM"):
        MtpDrafter.from_target("llama")


def test_a_layer_with_an_index_of_its_own_is_refused(tmp_path):
    index = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8}
    target, _ = published(tmp_path, "DeepseekV32", {**SIZES, **MLA, **MOE, **index})
    with pytest.raises(ValueError, match="has indexed_attention; full and sliding attention can follow a tree"):
        MtpDrafter.from_target(target)


def test_an_older_transformers_is_refused(monkeypatch, tmp_path):
    target, _ = published(tmp_path, "Glm4Moe", FAMILIES["Glm4Moe"])
    monkeypatch.delattr(modeling_layers.MtpModel, "forward_layer")
    with pytest.raises(ValueError, match=r"has no MtpModel\.forward_layer; install transformers>=5\.20"):
        MtpDrafter.from_target(target)


def test_a_target_with_recurrent_states_and_its_layer_serve_many_prompts_and_later_turns(tmp_path):
    target, _ = published(tmp_path, "Qwen3_5", FAMILIES["Qwen3_5"])
    drafter, budgets = MtpDrafter.from_target(target, Widths((2, 1))), [3, 14, 6, 9, 5]
    prompts = [*PROMPTS, *PROMPTS[:2]]
    expected = [reference(target, p, max_new_tokens=n).tolist() for p, n in zip(prompts, budgets, strict=True)]
    found = specdec.generate(target, prompts, drafter, max_new_tokens=budgets, batch_size=3)
    assert [text.tolist() for text in found.tokens] == expected
    last = specdec.generate(target, PROMPTS, drafter, max_new_tokens=6, keep=True)
    turns = [torch.cat([p, text, p[:1]]) for p, text in zip(PROMPTS, last.tokens, strict=True)]
    expected = [reference(target, turn, max_new_tokens=6).tolist() for turn in turns]
    assert [
        text.tolist() for text in specdec.generate(target, turns, drafter, max_new_tokens=6, resume=last).tokens
    ] == expected
