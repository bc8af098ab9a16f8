"""EAGLE drafts: the files of all tools that write them give the same network, and are written as engines read them."""

import dataclasses
import json

import eagle_files as files
import pytest
import torch
from eagle_files import HIDDEN, KNOWN, TEXT, VOCAB, logits, page, page_states, target, tensors
from safetensors.torch import save_file
from tiny_models import PROMPTS, reference

import specdec
from specdec import Sampling
from specdec.drafters import Eagle3Drafter, EagleDrafter
from specdec.drafters.states_net import TargetParts
from specdec.testing import exact_law, target_law
from specdec.trees import Chain, Widths

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return target()


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
        parts, states = TargetParts.of(model, net), page_states(net)
        last = net.follow(TEXT[:, -3:], states[:, -3:], page(3, first=5), parts)
        assert torch.allclose(net.follow(TEXT, states, page(8), parts)[:, -1], last[:, -1])


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
