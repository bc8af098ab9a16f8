"""Enlarged models compute what the small ones do."""

from typing import Any

import pytest
import torch
from tiny_models import llama

from experiments.demo_pair.enlarge import enlarge, widen
from specdec.drafters import MedusaHeads
from specdec.drafters.states_net import TargetParts


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


def test_medusa_heads_of_a_larger_state_have_the_same_logits():
    model, text, heads = llama(), torch.arange(1, 12)[None], MedusaHeads(3, 2, 32).double()
    for weights in heads.parameters():
        torch.nn.init.normal_(weights, 0, 0.5, generator=torch.Generator().manual_seed(0))
    large = enlarge(model, layers=4, intermediate_size=96, hidden_size=128)
    nothing: Any = None
    found = []
    for target, net in ((model, heads), (large, widen(heads, 128))):
        state = target.model(text).last_hidden_state[:, -1]
        found.append(net.block(nothing, state, nothing, 3, TargetParts.of(target, net)).logits)
    assert torch.allclose(*found, rtol=0, atol=1e-12)


def test_nothing_shrinks():
    with pytest.raises(ValueError, match="only grow"):
        enlarge(llama(), layers=1, intermediate_size=96)
    with pytest.raises(ValueError, match="from 32 on"):
        widen(MedusaHeads(2, 1, 32), 16)
