"""What nodes of a tree cost a model with recurrent state: beside one token, and tokens one by one, through transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5

from specdec.models.cache import GENERATE_CACHE
from specdec.models.causal_lm import CausalLM
from specdec.tree import chain
from specdec_kernels.reference.gated_delta import gated_delta
from specdec_kernels.reference.linear_attention import fold_linear_attention, linear_attention

NODES, HEADS, KEY_HEADS, DIM = 5, 32, 16, 128  # of Qwen3-Next-80B
KEPT = 3  # nodes of a chain that are committed
Timed = dict[str, Callable[[], Any]]

_CHAIN = torch.arange(NODES)[None], torch.tensor([KEPT])


def _random(*shape: int) -> Tensor:
    return torch.randn(1, *shape) * DIM**-0.5


def gated_delta_rule() -> Timed:
    """One layer's recurrence without projections and convolution."""
    query, key = _random(NODES, KEY_HEADS, DIM), _random(NODES, KEY_HEADS, DIM)
    value, decay, beta = _random(NODES, HEADS, DIM), -_random(NODES, HEADS).exp(), _random(NODES, HEADS).sigmoid()
    state, update = torch.randn(1, HEADS, DIM, DIM), torch.empty(1, NODES, HEADS, DIM)
    ancestors = chain(1, NODES).ancestors

    def theirs(function: Any, tokens: int) -> Callable[[], Any]:
        parts = {"query": query, "key": key, "value": value, "g": decay, "beta": beta}
        parts = {name: part[:, :tokens] for name, part in parts.items()}
        return lambda: function(**parts, initial_state=state, output_final_state=True)[0]

    def nodes() -> Tensor:
        return gated_delta(query * DIM**-0.5, key, value, decay, beta, state, ancestors, update)

    def committed() -> Tensor:
        read = nodes()
        fold_linear_attention(state, key, update, decay, *_CHAIN)
        return read

    one, many = modeling_qwen3_5.torch_recurrent_gated_delta_rule, modeling_qwen3_5.torch_chunk_gated_delta_rule
    return {
        "one token | transformers": theirs(one, 1),
        "5 tokens, one by one | transformers": theirs(one, NODES),
        "5 tokens at once | transformers": theirs(many, NODES),
        "5 nodes | specdec": nodes,
        "5 nodes and a commit | specdec": committed,
    }


def state_space() -> Timed:
    """The same of SSD (Mamba-2), with a state of 128 and one group."""
    read, write = _random(NODES, 1, DIM), _random(NODES, 1, DIM)
    value, step = _random(NODES, HEADS, DIM), _random(NODES, HEADS).exp()
    rate, state = -torch.rand(HEADS), torch.randn(1, HEADS, DIM, DIM)
    ancestors = chain(1, NODES).ancestors

    own = state.transpose(2, 3).clone()

    def token(node: int = 0) -> Tensor:
        parts = value[:, node], step[:, node, :, None].expand(-1, -1, DIM), rate[:, None, None].expand(-1, DIM, DIM)
        return modeling_mamba2.mamba2_selective_state_update(own, *parts, write[:, node], read[:, node])

    def nodes() -> Tensor:
        return linear_attention(read, write, value * step[..., None], rate * step, state, ancestors)

    def committed() -> Tensor:
        found = nodes()
        fold_linear_attention(state, write, value * step[..., None], rate * step, *_CHAIN)
        return found

    return {
        "one token | transformers": token,
        "5 tokens, one by one | transformers": lambda: torch.stack([token(node) for node in range(NODES)], 1),
        "5 nodes | specdec": nodes,
        "5 nodes and a commit | specdec": committed,
    }


def whole_model() -> Timed:
    """A random Qwen3.5-like model of 4 layers, 3 of them recurrent, with 128 tokens before."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, linear_num_key_heads=8, linear_num_value_heads=16,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    model = Qwen3_5ForCausalLM(config).eval()
    text = torch.arange(128 + NODES)[None]
    lm, own = CausalLM(model), DynamicCache(config=config)
    attending: list[Any] = [layer for layer in own.layers if isinstance(layer, CacheLayerMixin)]
    with torch.inference_mode():
        model(text[:, :128], use_cache=True, **{GENERATE_CACHE: own})
        cached = lm.start(1, text.shape[1] + NODES, NODES)
        cached.read_anew(text, {0: 128})
    start = cached.cache.lengths.clone()

    @torch.inference_mode()
    def token() -> None:
        place = torch.tensor([[128]])
        model(text[:, 128:129], position_ids=place, use_cache=True, **{GENERATE_CACHE: own})
        for layer in attending:
            layer.crop(-1)

    @torch.inference_mode()
    def step(compiled: bool = False) -> None:
        cached.compiles = compiled
        cached.forward(text[:, 128:], chain(1, NODES), 128)
        cached.cache.keep(*_CHAIN)
        cached.cache.lengths.copy_(start)

    return {
        "one token | transformers": token,
        "5 nodes and a commit | specdec": step,
        "5 nodes and a commit | specdec, compiled": partial(step, compiled=True),
    }
