"""What a model's own `prepare_inputs_for_generation` does beside handing over the tokens is seen, and refused by name."""

import pytest
import torch
from tiny_models import SIZES, build, llama, reference
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

import specdec
from specdec.drafters import NgramDrafter
from specdec.models.ready import UnsupportedModel

torch.set_num_threads(1)
PROMPT = torch.arange(1, 13)


class Prepares(LlamaForCausalLM):
    """Changes what it hands over by `change`."""

    change = staticmethod(lambda inputs, first: None)

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        self.change(inputs, is_first_iteration)
        return inputs

    def forward(self, *args, bias=0.0, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + bias * torch.arange(out.logits.shape[-1])
        return out


def control_token(inputs, first):
    if first:
        inputs["input_ids"] = torch.cat([torch.tensor([[33]]), inputs["input_ids"][:, 1:]], 1)


def last_five(inputs, first):
    if first:
        inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, -5:], inputs["attention_mask"][:, -5:]


def later_token(inputs, first):
    if not first:
        inputs["input_ids"] = inputs["input_ids"] * 0 + 33


def from_ten_on(inputs, first):
    length = inputs["attention_mask"].shape[1]
    inputs["position_ids"] = torch.arange(10, 10 + length)[None, -inputs["input_ids"].shape[1] :]


def without_the_first(inputs, first):
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][:, 0] = 0


def biased(inputs, first):
    inputs["bias"] = 1.0


CHANGES = {
    control_token: "other tokens than those of the text",
    last_five: "other tokens than those of the text",  # of texts that are longer: the probe's are not
    later_token: "other tokens than those of the text",
    from_ten_on: "positions that do not count from 0",
    without_the_first: "a mask that is not of the text alone",
    biased: "bias beside the tokens",
}


def prepares(change):
    torch.manual_seed(0)
    model = Prepares(LlamaConfig(**SIZES)).double().eval()
    for p in model.parameters():
        p.data *= 3 if p.dim() > 1 else 1
    model.change = change
    return model


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_model_hands_to_itself_besides_the_tokens_is_refused_by_name(change):
    model = prepares(change)
    match = (
        rf"Prepares cannot be .*Prepares\.prepare_inputs_for_generation hands over {CHANGES[change]}\. Only the tokens"
    )
    with pytest.raises(UnsupportedModel, match=match):
        specdec.generate(model, PROMPT, NgramDrafter(), max_new_tokens=8)
    with pytest.raises(UnsupportedModel, match=match):
        model.generate(PROMPT[None], max_new_tokens=8, custom_generate=specdec.custom_generate())


def test_a_model_is_asked_anew_when_it_prepares_in_another_way():
    model, plain = prepares(lambda inputs, first: None), llama(0)
    target = specdec.ModelTarget(model)
    for _ in range(2):
        found = specdec.generate(target, PROMPT, max_new_tokens=8).tokens[0]
        assert torch.equal(found, reference(model, PROMPT, max_new_tokens=8))
        assert torch.equal(found, reference(plain, PROMPT, max_new_tokens=8))
    model.change = control_token
    for again in (target, model):
        with pytest.raises(UnsupportedModel, match="other tokens"):
            specdec.generate(again, PROMPT, max_new_tokens=8)


def test_a_harmless_way_of_its_own_is_none_of_our_business():
    model = prepares(lambda inputs, first: inputs.update(token_type_ids=None, bias=0.0))
    found = model.generate(PROMPT[None], max_new_tokens=8, custom_generate=specdec.custom_generate(NgramDrafter()))
    assert torch.equal(found, model.generate(PROMPT[None], max_new_tokens=8))


def end_of_text(change):
    """The greedy text without `change`, and a model that reads its second new token as another."""
    text = reference(prepares(lambda inputs, first: None), PROMPT, max_new_tokens=12)
    assert text[1] not in PROMPT and text[1] != text[0]
    return text, prepares(change(int(text[1])))


def reading_as_33(token):
    def change(inputs, first):
        inputs["input_ids"] = torch.where(inputs["input_ids"] == token, 33, inputs["input_ids"])

    return change


CALLS = {
    "generate": lambda model, n: specdec.generate(model, PROMPT, NgramDrafter(), max_new_tokens=n).tokens[0],
    "stream": lambda model, n: torch.cat(
        [new for (new,) in specdec.stream(model, PROMPT, NgramDrafter(), max_new_tokens=n)]
    ),
    "custom_generate": lambda model, n: model.generate(
        PROMPT[None], max_new_tokens=n, do_sample=False, custom_generate=specdec.custom_generate(NgramDrafter())
    )[0, len(PROMPT) :],
}


@pytest.mark.parametrize("call", CALLS)
def test_a_token_that_is_read_as_another_is_found_in_the_finished_text(call):
    text, model = end_of_text(reading_as_33)
    assert not torch.equal(reference(model, PROMPT, max_new_tokens=12), text)
    with pytest.raises(UnsupportedModel, match=r"Prepares\.prepare_inputs_for_generation hands over other tokens"):
        CALLS[call](model, 12)
    assert torch.equal(CALLS[call](model, 2), text[:2])  # the last token of a text is not read


class Updates(LlamaForCausalLM):
    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)


def test_what_a_model_does_between_its_steps_is_refused_by_name():
    match = r"Updates cannot be .*Updates\._update_model_kwargs_for_generation may change what later steps compute"
    with pytest.raises(UnsupportedModel, match=match):
        specdec.generate(Updates(LlamaConfig(**SIZES)).eval(), PROMPT)


def test_what_depends_on_where_a_pass_begins_is_refused():
    model = llama()
    model.model.layers[1].register_forward_hook(lambda _, args, out: torch.cat([out[:, :1] * 3, out[:, 1:]], 1))
    with pytest.raises(UnsupportedModel, match=r"scored alone, after others in a cache, differs by .* a hook say"):
        specdec.generate(model, PROMPT)


class ReadsOnes(LlamaForCausalLM):
    """Takes a mask of ones for something else than none."""

    def forward(self, *args, attention_mask=None, **kwargs):
        out = super().forward(*args, attention_mask=attention_mask, **kwargs)
        out.logits = out.logits.roll(int(attention_mask is not None), -1)
        return out


def test_a_difference_without_a_name_is_refused_with_its_likely_causes():
    with pytest.raises(
        UnsupportedModel, match=r"attention_mask and position_ids, .* reads a mask of ones .*quantisation"
    ):
        specdec.generate(ReadsOnes(LlamaConfig(**SIZES)).eval(), PROMPT)


@pytest.fixture(scope="module")
def llava():
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8,
                              patch_size=4, projection_dim=16)  # fmt: skip
    text = LlamaConfig(**SIZES)
    return build("LlavaForConditionalGeneration", vision_config=vision, text_config=text, image_token_index=49)


def test_a_multimodal_model_decodes_plain_text(llava):
    assert isinstance(llava, LlavaForConditionalGeneration)
    inputs = {"input_ids": PROMPT[None], "attention_mask": torch.ones(1, len(PROMPT), dtype=torch.int64)}
    call = {**inputs, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = llava.generate(**call, custom_generate=specdec.custom_generate(NgramDrafter()))
    assert torch.equal(found, llava.generate(**call))
    [tokens] = specdec.generate(llava, PROMPT, NgramDrafter(), max_new_tokens=8, stop_tokens=()).tokens
    assert torch.equal(tokens, found[0, len(PROMPT) :])


def test_an_image_is_refused_by_what_was_passed(llava):
    ids = torch.tensor([[1, 49, 49, 49, 49, 2]])
    with pytest.raises(
        ValueError, match=r"image inputs such as pixel_values.*only input_ids and attention_mask are read"
    ):
        llava.generate(
            ids, pixel_values=torch.zeros(1, 3, 8, 8), max_new_tokens=4, custom_generate=specdec.custom_generate()
        )
