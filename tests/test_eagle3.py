"""EAGLE drafts: the files of all tools that write them give the same network, and are written as engines read them."""

import dataclasses
import json

import eagle_files as files
import pytest
import torch
from eagle_files import HIDDEN, KNOWN, LAYERS, VOCAB, Page, target, tensors
from safetensors.torch import load_file, save_file
from tiny_models import PROMPTS, reference

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
            drafter.save_pretrained(tmp_path / "made", format)
        return
    drafter.save_pretrained(tmp_path / "made", format)
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
