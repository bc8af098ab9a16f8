"""The exact law of the real loop over recurrent states: that of the loop without a draft, and near transformers' own."""

from functools import partial

import pytest
import torch
from hybrid_models import DELTA, MAMBA, disturbed, hybrid
from test_hybrids import (
    plant_a_convolution_that_is_shifted,
    plant_a_state_of_one_token_less,
    plant_decay_that_is_applied_twice,
)

import specdec
from specdec.drafters import ModelDrafter
from specdec.testing import exact_law, target_law
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
FEW = {"vocab_size": 4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MODELS = {
    "delta rule": partial(hybrid, "Qwen3_5", torch.float64, **{**DELTA, **FEW, "num_hidden_layers": 2,
                          "layer_types": ["linear_attention", "full_attention"]}),
    "SSD": partial(hybrid, "Mamba2", torch.float64, **{**MAMBA, **FEW, "num_hidden_layers": 1}, num_heads=8, head_dim=8,
                   state_size=8, n_groups=2, chunk_size=16),
}  # fmt: skip
PROMPT = (0, 1, 0)
EXACT, WRONG = 1e-12, 1e-3  # total variation

# transformers' functions for recurrences compute in float32. Ours compute in the model's dtype, here float64.
FLOAT32 = 1e-6


@pytest.mark.parametrize("tree", [Chain(2), Widths([2, 1])], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_law_is_that_of_the_loop_without_a_draft_and_near_that_of_transformers(name, tree):
    model = MODELS[name]()
    target, draft = specdec.ModelTarget(model), ModelDrafter(disturbed(model, 0.3), tree)
    alone = exact_law(target, PROMPT)
    law = exact_law(target, PROMPT, draft)
    assert law.total_variation(alone.probabilities) <= EXACT
    assert 1.1 < law.expected_tokens < 2.95, "some drafts are accepted, and some are not"
    assert 0 < law.total_variation(target_law(model, PROMPT)) < FLOAT32


@pytest.mark.parametrize("name", MODELS)
def test_the_law_of_whole_runs_is_that_of_the_loop_without_a_draft(name):
    model = MODELS[name]()
    target, draft = specdec.ModelTarget(model), ModelDrafter(disturbed(model, 0.3), Chain(1))
    alone, law = (exact_law(target, PROMPT, d, max_new_tokens=2, merge=False) for d in (None, draft))
    assert law.total_variation(alone.probabilities) <= EXACT


@pytest.mark.parametrize(
    "bug", [plant_a_state_of_one_token_less, plant_decay_that_is_applied_twice, plant_a_convolution_that_is_shifted]
)
@pytest.mark.parametrize("name", MODELS)
def test_planted_bugs_change_the_law_of_whole_runs(name, bug, monkeypatch):
    model = MODELS[name]()
    target, expected = specdec.ModelTarget(model), target_law(model, PROMPT)
    bug(monkeypatch)
    law = exact_law(target, PROMPT, merge=False)
    assert law.total_variation(expected) > WRONG
