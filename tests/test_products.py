"""Products of few rows in eager passes on a CPU: ours in passes of ours, torch's everywhere else."""

import threading
from typing import Any

import pytest
import torch
from tiny_models import PROMPTS, llama
from torch import nn

import specdec
import specdec_kernels.cpu
from specdec.models import products
from specdec.models.products import FewRows

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "stop_tokens": ()}


def wide() -> Any:
    """A model whose products are large enough to be ours; tiny ones are left to torch."""
    return llama(dtype=torch.float32, hidden_size=384, intermediate_size=512, num_hidden_layers=2)


def own_forwards(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


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


def test_a_model_is_found_as_it_was_left(counted):
    model, seen = wide(), []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(own_forwards(model)))
    specdec.generate(model, PROMPTS, **OPTIONS)
    assert max(seen) > 0 and own_forwards(model) == 0

    def fail(*_):
        raise InterruptedError

    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        specdec.generate(model, PROMPTS, **OPTIONS)
    assert own_forwards(model) == 0


def test_forward_functions_of_others_are_left_alone():
    """Those put there before a pass, and those put there within one."""
    model, mine = wide(), lambda x: x.new_zeros(*x.shape[:-1], 384)
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    first.forward = mine
    with FewRows(model):
        assert first.forward is mine
        second.forward = mine
    assert first.forward is mine and second.forward is mine


def test_other_threads_compute_what_they_did(counted):
    model, tokens, found = wide(), torch.tensor([[1, 2, 3]]), []
    with torch.no_grad():
        expected = model(tokens).logits

        def run():
            with torch.no_grad():
                found.append(model(tokens).logits)

        with FewRows(model):
            ours = model(tokens).logits
            beside = len(counted)
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    assert beside and len(counted) == beside and torch.equal(found[0], expected)
    torch.testing.assert_close(ours, expected)


def test_two_passes_of_one_model_do_not_end_each_other(counted):
    model = wide()
    with FewRows(model):
        with FewRows(model):
            pass
        assert own_forwards(model) > 0
    assert own_forwards(model) == 0


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
