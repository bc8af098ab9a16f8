"""Weights that multiply one input laid together in place: one product when compiled for a GPU, and no difference elsewhere."""

import copy
import weakref
from typing import Any

import pytest
import torch
from hybrid_models import GATED_DELTA, STATE_SPACE
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_model
from tiny_models import GATE, MATRIX, PROMPTS, llama
from torch import fx, nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import specdec
import specdec_kernels
from specdec.models.compilation import _Products
from specdec_kernels.joined_linear import together

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "stop_tokens": ()}
PRODUCTS = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.specdec.joined_linear
FAMILIES = {**GATE, "deepseek_v3": MATRIX["deepseek_v3_latent"],
            "qwen3_5": GATED_DELTA["qwen3_5"], "bamba": STATE_SPACE["bamba"]}  # fmt: skip


def groups(model) -> list[list[nn.Parameter]]:
    """Of each layer of a Llama: what lies together once it is joined."""
    return [
        [getattr(part, f"{name}_proj").weight for name in names]
        for layer in model.model.layers
        for part, names in ((layer.self_attn, "qkv"), (layer.mlp, ("gate", "up")))
    ]


def joined(model) -> list[bool]:
    return [together(weights) is not None for weights in groups(model)]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Parts of compiled passes run as they stand, with the products of a GPU: how many of each, before and after."""
    counts: list[tuple[int, int]] = []

    def after_the_pass(gm: fx.GraphModule, example_inputs):
        before = products(gm.graph)
        _Products()(gm.graph)
        gm.recompile()
        counts.append((before, products(gm.graph)))
        return make_boxed_func(gm.forward)

    def part(graph: fx.GraphModule, inputs):
        return aot_module_simplified(graph, inputs, after_the_pass, decompositions=select_decomp_table())

    monkeypatch.setattr(specdec_kernels, "DEVICES", {"cpu"})
    monkeypatch.setattr("specdec.models.compilation._part", part)
    torch._dynamo.reset()
    return counts


def products(graph: fx.Graph) -> int:
    return sum(getattr(node.target, "overloadpacket", None) in PRODUCTS for node in graph.nodes)


def test_a_compiled_layer_has_four_products_in_place_of_seven(as_on_a_gpu):
    model = specdec.join_weights(llama(dtype=torch.float32))
    expected = specdec.generate(model, PROMPTS, **OPTIONS).tokens
    found = specdec.generate(model, PROMPTS, engine="compile", **OPTIONS).tokens
    assert all(map(torch.equal, found, expected))
    assert as_on_a_gpu == [(0, 0), (7, 4), (1, 1)]  # before the layers, a layer, and after them


def test_code_is_right_when_weights_no_longer_lie_together(as_on_a_gpu):
    model, engine = specdec.join_weights(llama(dtype=torch.float32)), specdec.Graphs(compile=True)
    expected = specdec.generate(model, PROMPTS, **OPTIONS).tokens
    for apart in (False, True):
        if apart:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        assert any(joined(model)) != apart
        found = specdec.generate(model, PROMPTS, engine=engine, **OPTIONS).tokens
        assert all(map(torch.equal, found, expected))
    assert len(as_on_a_gpu) == 3  # compiled once


def test_layers_with_biases_keep_products_of_their_own(as_on_a_gpu):
    model = specdec.join_weights(MATRIX["qwen2"]())
    expected = specdec.generate(model, PROMPTS, **OPTIONS).tokens
    found = specdec.generate(model, PROMPTS, engine="compile", **OPTIONS).tokens
    assert all(map(torch.equal, found, expected))
    assert as_on_a_gpu[1] == (7, 6) and joined(model) == [False, True] * 3


def test_parameters_are_the_same_and_nothing_else_keeps_their_memory():
    model = llama(tie_word_embeddings=True)
    before, numbers = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    held = [weakref.ref(weight.untyped_storage()) for weights in groups(model) for weight in weights]
    assert specdec.join_weights(model) is model and all(joined(model))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert all(torch.equal(value, numbers[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in after.values())
    assert not [storage for storage in held if storage() is not None]
    kept = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in after.values()}
    assert sum(kept.values()) == sum(p.nbytes for p in after.values())
    places = [weight.data_ptr() for weights in groups(model) for weight in weights]
    specdec.join_weights(model)
    assert places == [weight.data_ptr() for weights in groups(model) for weight in weights]


def test_no_more_than_one_group_exists_twice():
    model = llama(num_hidden_layers=8)
    old = [weakref.ref(weight.untyped_storage()) for weights in groups(model) for weight in weights]
    sizes, most = [weight.nbytes for weights in groups(model) for weight in weights], 0

    class Watch(TorchDispatchMode):
        """Bytes of weights that exist twice, when more memory is asked for."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            if func.overloadpacket is torch.ops.aten.new_empty:
                done = sum(w.nbytes for ws in groups(model) if together(ws) is not None for w in ws)
                alive = sum(size for ref, size in zip(old, sizes, strict=True) if ref() is not None)
                most = max(most, done + alive - sum(sizes))
            return func(*args, **(kwargs or {}))

    with Watch():
        specdec.join_weights(model)
    assert most == 0 and all(joined(model))


LEFT_ALONE = {
    "held by another": lambda layer: layer.weight.detach(),
    "a part of a larger one": lambda layer: setattr(layer.weight, "data", torch.randn(2, *layer.weight.shape).double()[0]),
    "computed": parametrizations.weight_norm,
    "cast": lambda layer: layer.float(),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_moved_is_left_alone(name):
    model = llama()
    layer = model.model.layers[1].self_attn.k_proj
    kept = LEFT_ALONE[name](layer)
    if name == "cast":
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
        layer.register_forward_hook(lambda module, inputs, output: output.double())
    expected = specdec.generate(model, PROMPTS, **OPTIONS).tokens
    places = [weight.data_ptr() for weight in groups(model)[2]]
    specdec.join_weights(model)
    assert places[1] == layer.weight.data_ptr() or name == "computed"
    assert joined(model) == [True, True, False, True, True, True]
    assert all(map(torch.equal, specdec.generate(model, PROMPTS, **OPTIONS).tokens, expected))
    assert name != "held by another" or kept.data_ptr() == layer.weight.data_ptr()


def test_a_parameter_of_two_layers_stays_one():
    model = llama()
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    second.k_proj.weight = first.k_proj.weight
    expected = specdec.generate(model, PROMPTS, **OPTIONS).tokens
    specdec.join_weights(model)
    assert second.k_proj.weight is first.k_proj.weight and joined(model)[::2] == [True, False, True]
    assert all(map(torch.equal, specdec.generate(model, PROMPTS, **OPTIONS).tokens, expected))


def test_training_goes_on_as_before():
    models = [llama(), specdec.join_weights(llama())]
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            model(PROMPTS[2][None], labels=PROMPTS[2][None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected, found = (model.state_dict() for model in models)
    assert all(joined(models[1])) and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_of_peft_may_come_before_and_after():
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    texts = []
    for when in ("never", "before", "after"):
        torch.manual_seed(3)
        model = llama()
        if when == "before":
            specdec.join_weights(model)
        torch.manual_seed(4)
        adapted = get_peft_model(model, config).eval()
        if when == "after":
            specdec.join_weights(model)
        texts.append(specdec.generate(model, PROMPTS, **OPTIONS).tokens)
        adapters = get_peft_model_state_dict(adapted).values()
        assert all(
            value.untyped_storage().nbytes() == value.nbytes for value in adapters
        )  # files of these hold no more
    assert all(torch.equal(a, b) for others in texts[1:] for a, b in zip(texts[0], others, strict=True))


def test_copies_casts_files_and_stored_weights_are_as_of_any_other_model(tmp_path):
    model, plain = specdec.join_weights(llama(dtype=torch.float32)), llama(dtype=torch.float32)
    expected = plain.state_dict()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "state")
    save_model(model, str(tmp_path / "tied"))  # leaves out what shares a storage
    made = {
        "tied": load_file(tmp_path / "tied"),
        "copied": copy.deepcopy(model).state_dict(),
        "saved": type(model).from_pretrained(tmp_path).state_dict(),
        "written": torch.load(tmp_path / "state"),
    }
    assert all(torch.equal(found[name], value) for found in made.values() for name, value in expected.items())
    assert all(
        torch.equal(a, b)
        for a, b in zip(copy.deepcopy(model).bfloat16().parameters(), plain.bfloat16().parameters(), strict=True)
    )
    stored, others = (specdec.store_weights(each, "int8") for each in (model, llama(dtype=torch.float32)))
    assert all(torch.equal(a, b) for a, b in zip(stored.buffers(), others.buffers(), strict=True))
    assert specdec.join_weights(stored) is stored


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_of_any_family_stay_what_they_were(name):
    model = FAMILIES[name]()
    expected = specdec.generate(model, PROMPTS, **OPTIONS).tokens
    assert all(map(torch.equal, specdec.generate(specdec.join_weights(model), PROMPTS, **OPTIONS).tokens, expected))


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"training mode"):
        specdec.join_weights(llama().train())
