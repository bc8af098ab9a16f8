"""Models whose forward pass takes fewer arguments than those of transformers do, and models that give no logits."""

import inspect

import pytest
import torch
from tiny_models import SIZES, llama, reference
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

import specdec
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.models.cache import GENERATE_CACHE
from specdec.models.ready import UnsupportedModel
from specdec.trees import Widths

torch.set_num_threads(1)
PROMPT = torch.arange(1, 8)
TAKEN = ("input_ids", "attention_mask", "position_ids", GENERATE_CACHE, "use_cache", "logits_to_keep", "return_dict")


def narrow(without, seed=0):
    """A Llama whose forward pass has no argument of this name."""
    taken = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in TAKEN if name != without]

    class Narrow(LlamaForCausalLM):
        def forward(self, **kwargs):
            unknown = kwargs.keys() - {each.name for each in taken}
            assert not unknown, unknown
            return LlamaForCausalLM.forward(self, **kwargs)

    Narrow.forward.__signature__ = inspect.Signature(
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *taken]
    )
    model = Narrow(LlamaConfig(**SIZES)).double().eval()
    model.load_state_dict(llama(seed).state_dict())
    return model


def test_a_forward_pass_that_keeps_all_logits_decodes_as_target_and_as_draft():
    model, draft = narrow("logits_to_keep"), ModelDrafter(narrow("logits_to_keep", 1), Widths([2, 2, 1]))
    expected = reference(model, PROMPT, max_new_tokens=12)
    assert torch.equal(expected, reference(llama(), PROMPT, max_new_tokens=12))
    for drafter in (None, NgramDrafter(), draft):
        [tokens] = specdec.generate(model, PROMPT, drafter, max_new_tokens=12).tokens
        assert torch.equal(tokens, expected)


def test_a_forward_pass_without_positions_is_refused_by_name():
    assert len(reference(narrow("position_ids"), PROMPT, max_new_tokens=4)) == 4
    with pytest.raises(UnsupportedModel, match=r"Narrow cannot be .*its forward pass takes no position_ids"):
        specdec.generate(narrow("position_ids"), PROMPT)


@pytest.mark.parametrize(
    "kind", [LlamaModel, LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering]
)
@pytest.mark.parametrize("wrap", [specdec.ModelTarget, ModelDrafter])
def test_a_model_without_an_lm_head_is_refused_with_the_cure(kind, wrap):
    headless = kind(LlamaConfig(**SIZES)).eval()
    with pytest.raises(UnsupportedModel, match=f"{kind.__name__} cannot be .*no LM head.*AutoModelForCausalLM"):
        wrap(headless)
