"""A model made larger without changing what it computes: real acceptance at the cost ratio of a large model.

The new layers add exactly nothing to the residual stream (their output projections are zero) and the new MLP units are
not read, but all of them are computed. This is no better a model, and its figures say nothing about quality; they say
what decoding costs when the target is that large and agrees with its draft as the small one did.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LlamaForCausalLM

import specdec
from experiments.inputs import Models


def load(layers: int, intermediate_size: int, noise: float = 0.0, dtype: torch.dtype = torch.float32) -> Models:
    """The demo pair with its target enlarged."""
    pair = specdec.demo.load(dtype)
    assert isinstance(pair.target, LlamaForCausalLM)
    return Models(enlarge(pair.target, layers, intermediate_size, noise), pair.draft, pair.tokenizer, pair.heads)


def enlarge(model: LlamaForCausalLM, layers: int, intermediate_size: int, noise: float = 0.0) -> LlamaForCausalLM:
    """A Llama with `layers` layers and wider MLPs whose logits are those of `model`.

    Args:
        model: at most as large.
        layers: number of layers; the new ones come last.
        intermediate_size: width of every MLP.
        noise: standard deviation of what would be zero, to keep predictions from being identical.
    """
    config = copy.deepcopy(model.config)
    if layers < config.num_hidden_layers or intermediate_size < config.intermediate_size:
        raise ValueError(
            f"layers={layers}, intermediate_size={intermediate_size}: the model already has "
            f"{config.num_hidden_layers} layers of {config.intermediate_size}; it can only grow."
        )
    config.num_hidden_layers, config.intermediate_size = layers, intermediate_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        large = LlamaForCausalLM(config).eval()
        large.to(dtype=model.dtype)  # type: ignore[call-arg] - torch's own signature is overloaded
        _make_silent(large, noise)
    _copy_into(large, model)
    large.generation_config = copy.deepcopy(model.generation_config)
    return large


@torch.no_grad()
def _make_silent(model: Any, noise: float) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.normal_(0, noise)
        layer.mlp.down_proj.weight.normal_(0, noise)


@torch.no_grad()
def _copy_into(large: LlamaForCausalLM, small: LlamaForCausalLM) -> None:
    """Each weight of the small model becomes the leading block of the large one's."""
    weights = large.state_dict()
    for name, weight in small.state_dict().items():
        weights[name][tuple(slice(n) for n in weight.shape)] = weight
