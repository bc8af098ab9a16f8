"""Products of few rows in eager passes on a CPU: ours in passes of ours, torch's everywhere else."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from tiny_models import PROMPTS, llama
from torch import nn

import specdec
import specdec_kernels.cpu
from specdec.models import products
from specdec.models.products import few_rows

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "stop_tokens": ()}


def wide() -> Any:
    """A model whose products are large enough to be ours; tiny ones are left to torch."""
    return llama(dtype=torch.float32, hidden_size=384, intermediate_size=512, num_hidden_layers=2)


def passes() -> Any:
    return few_rows(torch.device("cpu"))


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Rows of the products that are ours."""
    rows, ours = [], products.linear

    def linear(x, weight):
        rows.append(len(x))
        return ours(x, weight)

    monkeypatch.setattr(products, "linear", linear)
    return rows


def test_passes_of_few_rows_are_ours_and_give_the_same_text(counted):
    model = wide()
    expected = [
        model.generate(p[None], max_new_tokens=6, do_sample=False, eos_token_id=None)[0, len(p) :] for p in PROMPTS
    ]
    assert not counted
    found = specdec.generate(model, PROMPTS, **OPTIONS).tokens
    assert all(map(torch.equal, found, expected)) and counted.count(len(PROMPTS)) == 6 * 2 * 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="torch's own products use matrix units")
def test_products_in_bfloat16_are_ours_but_for_those_with_a_bias(bias, counted):
    """Torch adds a bias before it rounds to bfloat16."""
    layer, x = nn.Linear(512, 512, bias=bias, dtype=torch.bfloat16), torch.randn(1, 3, 512).bfloat16()
    with torch.no_grad(), passes():
        found = layer(x)
    assert counted == ([] if bias else [3])
    torch.testing.assert_close(found, layer(x))


def test_a_model_is_left_as_it_is_found_even_within_a_pass():
    """So a copy that another thread or a hook makes meanwhile computes with its own weights, and a model can be pickled."""
    model, made = wide(), []

    def state():
        return [(type(layer), dict(vars(layer))) for layer in model.model.layers.modules()]

    def copied(*_):
        assert state() == left
        made.extend([copy.deepcopy(model.lm_head), pickle.loads(pickle.dumps(model.lm_head))])

    model.model.embed_tokens.register_forward_hook(copied)
    left = state()
    specdec.generate(model, PROMPTS, **OPTIONS)
    assert state() == left and made
    with torch.inference_mode():
        for head in made:
            head.weight.zero_()
            assert not head(torch.ones(1, 384)).any()


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("put", ["on the layer", "in its class"])
def test_forward_functions_of_others_are_called(put, counted):
    model = wide()
    with torch.no_grad(), passes():
        model(torch.tensor([[1, 2, 3]]))
        head, x = model.lm_head, torch.randn(3, 384)
        expected = head(x)
        if put == "on the layer":
            head.forward = lambda input: 2 * nn.Linear.forward(head, input)
        else:
            head.__class__ = Doubled
        assert torch.equal(head(x), 2 * expected)
    assert counted[-2:] == [3, 3]


def test_who_replaced_the_function_of_all_linear_layers_is_left_alone(monkeypatch, counted):
    monkeypatch.setattr(nn.Linear, "forward", theirs := lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
    with torch.no_grad(), passes():
        assert nn.Linear.forward is theirs and not wide()(torch.tensor([[1, 2, 3]])).logits.any()
    assert not counted


def test_other_threads_compute_what_they_did(counted):
    model, tokens, found = wide(), torch.tensor([[1, 2, 3]]), []
    with torch.no_grad():
        expected = model(tokens).logits

        def run():
            with torch.no_grad():
                found.append(model(tokens).logits)

        with passes():
            ours = model(tokens).logits
            beside = len(counted)
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    assert beside and len(counted) == beside and torch.equal(found[0], expected)
    torch.testing.assert_close(ours, expected)


def test_a_pass_within_a_pass_does_not_end_it_and_one_that_fails_is_over(counted):
    layer, x = nn.Linear(512, 512), torch.randn(2, 512)
    with torch.no_grad():
        with passes():
            with pytest.raises(InterruptedError), passes():
                raise InterruptedError
            layer(x)
        assert counted == [2]
        layer(x)
    assert counted == [2]


def test_what_asks_for_gradients_gets_them(counted):
    layer, x = nn.Linear(512, 512), torch.randn(2, 512)
    with passes():
        layer(x).sum().backward()
    grad = layer.weight.grad
    assert not counted and grad is not None and torch.allclose(grad[0], x.sum(0))


@pytest.mark.parametrize("by", [torch.jit.script, lambda layer: torch.jit.trace(layer, torch.randn(1, 512))])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_linear_layers_can_be_scripted_and_traced(by):
    layer, x = nn.Linear(512, 512), torch.randn(2, 512)
    with passes():
        pass
    assert torch.equal(by(layer)(x), layer(x))


def test_what_another_thread_has_compiled_is_not_compiled_again(counted):
    """Code generation is left out: it takes long."""
    made, layer, x = [], nn.Linear(512, 512), torch.randn(2, 512)

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    with passes():
        pass
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected = compiled(x)

        def run():
            with torch.no_grad():
                assert torch.equal(compiled(x), expected)
                made.append("run")

        with passes():
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    assert len(made) == 2 and made[1] == "run" and not counted


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_model_that_its_owner_has_compiled_gives_the_same_text():
    """Code generation is left out: it takes long."""
    torch._dynamo.reset()
    model = wide()
    expected = specdec.generate(model, PROMPTS, **OPTIONS).tokens
    model.compile(backend="eager")
    found = specdec.generate(model, PROMPTS, **OPTIONS).tokens
    assert all(map(torch.equal, found, expected))


def test_products_under_autocast_are_torchs(counted):
    with torch.autocast("cpu", torch.bfloat16):
        specdec.generate(wide(), PROMPTS, **OPTIONS)
    assert not counted


def test_without_a_compiler_torch_does_it_and_that_is_said_once(monkeypatch, counted):
    model, expected = wide(), specdec.generate(wide(), PROMPTS, **OPTIONS).tokens

    def missing():
        raise RuntimeError("No working C++ compiler found")

    counted.clear()
    monkeypatch.setattr(specdec_kernels.cpu, "load", missing)
    specdec_kernels.cpu.can_load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="No working C") as said:
            found = [specdec.generate(model, PROMPTS, **OPTIONS).tokens for _ in range(2)][1]
    finally:
        specdec_kernels.cpu.can_load.cache_clear()
    assert len(said) == 1 and not counted and all(map(torch.equal, found, expected))
