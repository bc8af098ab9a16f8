"""Whether a model has changed is seen in one look per run, and whatever its modules hold."""

import copy

import pytest
import torch
from tiny_models import llama, reference

import specdec
from specdec.drafters import LayerSkipDrafter, MedusaDrafter, MedusaHeads, ModelDrafter, NgramDrafter
from specdec.models.fingerprint import fingerprint
from specdec.trees import Chain

torch.set_num_threads(1)
PROMPT = torch.arange(1, 8)


def holds_itself(model):
    notes = {"scale": 1.0}
    notes["me"], notes["list"] = notes, [notes]
    model.model.layers[0].notes = notes
    return model


CHANGES = {
    "weight written": lambda m: m.lm_head.weight.detach().mul_(2),
    "weight elsewhere": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "mode": lambda m: m.model.layers[1].train(),
    "attribute": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.1),
    "attribute deep inside": lambda m: m.model.layers[0].notes["list"][0].update(scale=2.0),
    "one more attribute": lambda m: setattr(m.model.layers[0], "gate", 1),
    "hook": lambda m: m.model.layers[1].register_forward_hook(lambda *_: None),
    "module of the same kind": lambda m: setattr(m.model.layers[1].mlp, "act_fn", copy.copy(m.model.layers[1].mlp.act_fn)),
    "order of layers": lambda m: m.model.layers._modules.update(zip("01", list(m.model.layers)[1::-1], strict=True)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_nothing_else(change):
    model = holds_itself(llama())
    before = fingerprint(model, numbers=True)
    specdec.generate(model, PROMPT, LayerSkipDrafter(exit_layer=1), max_new_tokens=4)
    specdec.generate(model, PROMPT, MedusaDrafter(MedusaHeads(2, 1, 32).double(), Chain(2)), max_new_tokens=4)
    assert fingerprint(model, numbers=True) == before
    CHANGES[change](model)
    assert fingerprint(model, numbers=True) != before


def test_where_tensors_lie_is_all_that_counts_without_numbers():
    model = llama()
    before = fingerprint(model, numbers=False)
    CHANGES["weight written"](model)
    assert fingerprint(model, numbers=False) == before
    CHANGES["weight elsewhere"](model)
    assert fingerprint(model, numbers=False) != before


def test_writing_that_nobody_counts_makes_tensors_unequal_to_themselves():
    with torch.inference_mode():
        model = llama()
    assert fingerprint(model, numbers=True) != fingerprint(model, numbers=True)
    assert fingerprint(model, numbers=False) == fingerprint(model, numbers=False)


def test_a_model_that_holds_itself_is_decoded():
    model = holds_itself(llama())
    [tokens] = specdec.generate(model, PROMPT, NgramDrafter(), max_new_tokens=8).tokens
    assert torch.equal(tokens, reference(model, PROMPT, max_new_tokens=8))


def custom(model, drafter):
    return model.generate(PROMPT[None], max_new_tokens=4, custom_generate=specdec.custom_generate(drafter))


CALLS = {
    "model": lambda model, target, drafter: specdec.generate(model, PROMPT, drafter, max_new_tokens=4),
    "target": lambda model, target, drafter: specdec.generate(target, PROMPT, drafter, max_new_tokens=4),
    "kept": lambda model, target, drafter: specdec.generate(target, PROMPT, drafter, max_new_tokens=4, keep=True),
    "graphs": lambda model, target, drafter: specdec.generate(
        target, PROMPT, drafter, max_new_tokens=4, engine="graph"
    ),
    "custom_generate": lambda model, target, drafter: custom(model, drafter),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_run_looks_at_each_of_its_models_once_at_most(call, monkeypatch):
    """It takes time in proportion to the number of modules, which short runs would spend for nothing."""
    model, drafter, seen = llama(), ModelDrafter(llama(1)), []
    target = specdec.ModelTarget(model)

    def noting(*models, numbers):
        seen.extend(models)
        return fingerprint(*models, numbers=numbers)

    for module in ("models.probe", "models.cached_model", "runs"):
        monkeypatch.setattr(f"specdec.{module}.fingerprint", noting)
    CALLS[call](model, target, drafter)
    assert len({*map(id, seen)}) == len(seen)
    if call in ("kept", "graphs"):
        assert {*map(id, seen)} == {id(model), id(drafter.model)}
