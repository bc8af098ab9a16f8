"""Enlarged models compute what the small ones do."""

import pytest
import torch
from tiny_models import llama

from experiments.enlarge import enlarge


def test_an_enlarged_model_has_the_same_logits():
    model, text = llama(), torch.arange(1, 12)[None]
    large = enlarge(model, layers=7, intermediate_size=96)
    assert sum(p.numel() for p in large.parameters()) > 2 * sum(p.numel() for p in model.parameters())
    assert torch.allclose(large(text).logits, model(text).logits, rtol=0, atol=1e-12)  # float64, another sum order
    assert not torch.allclose(enlarge(model, 7, 96, noise=0.1)(text).logits, model(text).logits, atol=1e-3)


def test_a_larger_state_changes_nothing():
    model, text = llama(), torch.arange(1, 12)[None]
    large = enlarge(model, layers=4, intermediate_size=96, hidden_size=4 * model.config.hidden_size)
    assert large.config.num_attention_heads == 4 * model.config.num_attention_heads
    assert torch.allclose(large(text).logits, model(text).logits, rtol=0, atol=1e-12)


def test_a_model_does_not_shrink():
    with pytest.raises(ValueError, match="only grow"):
        enlarge(llama(), layers=1, intermediate_size=96)
