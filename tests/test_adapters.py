"""Adapters of PEFT: the text is that of transformers' and PEFT's own generate, or is refused with the reason and the cure."""

import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import llama, reference

import specdec
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.models.cached_model import CachedModel
from specdec.models.ready import UnsupportedModel
from specdec.testing import Tape
from specdec.trees import Widths

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # PEFT asks transformers for it
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),  # a second adapter
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),  # of soft prompts
]
PROMPT = torch.arange(1, 30)
BATCH = torch.arange(1, 31).reshape(3, 10)
PROJECTIONS = ["q_proj", "k_proj", "v_proj"]
DRAFT = llama(1)


def lora(**options):
    return LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False, **options)


def with_two_adapters():
    """A model of transformers in which PEFT has put the adapters "a" and "b"."""
    model = llama(0)
    torch.manual_seed(1)
    for name in "ab":
        inject_adapter_in_model(lora(), model, adapter_name=name)
    return model.eval()


def each_layer(call, *args):
    """A switch of a model's adapters, layer by layer: how depends on the versions of PEFT and transformers otherwise."""

    def switch(model):
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                call(layer, *args)

    return switch


SWITCHES = {
    "adapter a": each_layer(BaseTunerLayer.set_adapter, "a"),
    "adapter b": each_layer(BaseTunerLayer.set_adapter, "b"),
    "b at three times its strength": each_layer(lambda layer: layer.set_scale("b", 3.0)),
    "no adapter": each_layer(BaseTunerLayer.enable_adapters, False),
    "b again": each_layer(BaseTunerLayer.enable_adapters, True),
    "b merged": each_layer(lambda layer: layer.merge()),
}


@pytest.mark.parametrize("engine", ["eager", "graphs"])
def test_a_switch_of_adapters_leaves_no_key_and_no_graph_of_the_last_one(engine):
    model = with_two_adapters()
    target, drafter, found, out = specdec.ModelTarget(model), ModelDrafter(model, Widths((2, 1))), [], None
    engine = specdec.Graphs(capture=Tape) if engine == "graphs" else engine
    for switch in SWITCHES.values():
        switch(model)
        for _ in range(2):
            out = specdec.generate(
                target, PROMPT, drafter, max_new_tokens=12, resume=out, keep=True, engine=engine, stop_tokens=()
            )
            found.append(out.tokens[0].tolist())
            assert found[-1] == reference(model, PROMPT, max_new_tokens=12, eos_token_id=None).tolist()
    assert len({*map(tuple, found)}) == 4  # adapter a, b, b at another strength, and none


def test_what_has_not_been_switched_is_resumed(monkeypatch):
    model, read = with_two_adapters(), []
    last, forward = None, CachedModel.forward

    def noting(self, tokens, *args, **kwargs):
        read.append(tokens.shape[1])
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(CachedModel, "forward", noting)
    passes = []
    for switch in (lambda: None, lambda: None, lambda: SWITCHES["adapter a"](model)):
        switch()
        read.clear()
        last = specdec.generate(model, PROMPT, max_new_tokens=1, resume=last, keep=True)
        passes.append([*read])
    assert passes == [[len(PROMPT) - 1, 1], [1], [len(PROMPT) - 1, 1]]


SOFT = {
    "prompt tuning": (PromptTuningConfig, {}, "embeddings in place of tokens"),
    "P-tuning": (PromptEncoderConfig, {"encoder_hidden_size": 16}, "embeddings in place of tokens"),
    "prefix tuning": (PrefixTuningConfig, {}, "keys and values to go before the text"),
}


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("kind", SOFT)
def test_soft_prompts_are_refused_by_name(kind, probed):
    cls, options, what = SOFT[kind]
    base = llama(0)
    if probed:  # the bare model is known, and right
        assert (
            specdec.generate(base, PROMPT, max_new_tokens=4).tokens[0].tolist()
            == reference(base, PROMPT, max_new_tokens=4).tolist()
        )
    model = get_peft_model(base, cls(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)).eval()
    inputs = {"input_ids": PROMPT[None], "attention_mask": torch.ones(1, len(PROMPT), dtype=torch.int64)}
    with pytest.raises(UnsupportedModel, match=rf"PeftModelForCausalLM\.prepare_inputs.* hands over {what}.*LoRA"):
        model.generate(**inputs, max_new_tokens=4, custom_generate=specdec.custom_generate())
    with pytest.raises(
        ValueError, match=r"PeftModelForCausalLM; pass the model in it, \.base_model \(without .*soft prompts"
    ):
        specdec.generate(model, PROMPT)
    with model.disable_adapter():
        found = model.generate(**inputs, max_new_tokens=4, custom_generate=specdec.custom_generate())
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=4))


ACTIVATED = [[3, 4, 12, 13, 5, 6, 9], [3, 4, 5, 12, 13]]


@pytest.mark.parametrize("prompt", [*ACTIVATED, [3, 4, 5, 12, 14, 9]], ids=str)
def test_activated_lora_is_refused_where_it_is_activated(prompt):
    torch.manual_seed(1)
    model = get_peft_model(llama(0), lora(task_type="CAUSAL_LM", alora_invocation_tokens=[12, 13])).eval()
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
    base, ours = (
        model.base_model.model,
        {"max_new_tokens": 8, "custom_generate": specdec.custom_generate(NgramDrafter())},
    )
    expected = base.generate(**inputs, max_new_tokens=8)  # by itself it does not look for the invocation
    assert torch.equal(base.generate(**inputs, **ours), expected)
    if prompt in ACTIVATED:
        assert not torch.equal(model.generate(**inputs, max_new_tokens=8), expected)
        with pytest.raises(UnsupportedModel, match=r"activated LoRA counts .* from the end .*plain LoRA"):
            model.generate(**inputs, **ours)
    else:
        assert torch.equal(model.generate(**inputs, **ours), model.generate(**inputs, max_new_tokens=8))


@pytest.mark.parametrize("names", [["one", "two", "__base__"], ["two", "two", "one"]], ids="-".join)
def test_each_row_of_a_batch_may_have_its_own_adapter_in_the_first_call_too(names):
    torch.manual_seed(1)
    model = get_peft_model(llama(0), lora(task_type="CAUSAL_LM"), adapter_name="one")
    model.add_adapter("two", lora(task_type="CAUSAL_LM"))
    model.eval()
    call = {"input_ids": BATCH, "attention_mask": torch.ones_like(BATCH), "max_new_tokens": 10}
    found = model.generate(**call, adapter_names=names, custom_generate=specdec.custom_generate(ModelDrafter(DRAFT)))
    expected = model.generate(**call, adapter_names=names)
    assert torch.equal(found, expected) and not torch.equal(expected, model.generate(**call))
    found = model.generate(**call, custom_generate=specdec.custom_generate(ModelDrafter(DRAFT)))
    assert torch.equal(found, model.generate(**call))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
        {"target_modules": PROJECTIONS, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": PROJECTIONS, "trainable_token_indices": [3, 4, 5]},
        {"target_modules": PROJECTIONS, "use_dora": True},
    ],
    ids=["embeddings", "saved modules", "trained tokens", "DoRA"],
)
def test_adapters_of_any_layer_give_the_text_of_peft(options):
    torch.manual_seed(1)
    model = get_peft_model(llama(0), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora" not in name:
                p.add_(torch.randn_like(p), alpha=0.5)
    call = {"input_ids": BATCH, "attention_mask": torch.ones_like(BATCH), "max_new_tokens": 10}
    expected = model.generate(**call)
    assert torch.equal(model.generate(**call, custom_generate=specdec.custom_generate(ModelDrafter(DRAFT))), expected)
    bare = llama(0).generate(**call)
    assert not torch.equal(bare, expected)
