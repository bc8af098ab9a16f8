"""What else computes tree attention: each prepares a call on the op's arguments, every row of the same length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specdec_kernels.reference import tree_attention as reference

Arguments = dict[str, Any]
Call = Callable[[Arguments], Tensor]  # returns [batch, node, heads, head_dim]
BLOCK = 128  # slots in a block of FlexAttention


def transformers_sdpa(arguments: Arguments) -> Call:
    """transformers' own attention under a dense mask, keys and values repeated for each group."""
    mask = _mask(arguments)
    query, key = arguments["query"], arguments["key"]
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=False, training=False)
    return lambda a: sdpa_attention_forward(module, a["query"], a["key"], a["value"], mask)[0]  # type: ignore[arg-type]


def sdpa(backend: SDPBackend, arguments: Arguments) -> Call:
    """One backend of torch's attention under a dense mask."""
    mask = _mask(arguments)

    def call(a: Arguments) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                a["query"], a["key"], a["value"], attn_mask=mask, enable_gqa=True
            ).transpose(1, 2)

    return call


def flex(arguments: Arguments, compiled: bool = True) -> Call:
    """FlexAttention: blocks of the prefix unmasked, one pattern for every tree and length of a shape."""
    seen, length = _mask(arguments)[:, 0], int(arguments["lengths"][0])
    batch, nodes, slots = seen.shape
    full, blocks = length // BLOCK, -(-slots // BLOCK)
    index = torch.arange(blocks, dtype=torch.int32, device=seen.device)
    rows = -(-nodes // BLOCK)

    def listed(first: int, count: int) -> tuple[Tensor, Tensor]:
        order = index.roll(-first).expand(batch, 1, rows, -1).contiguous()
        return torch.full((batch, 1, rows), count, dtype=torch.int32, device=seen.device), order

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return seen[b, q.clamp(max=nodes - 1), kv.clamp(max=slots - 1)]

    mask = BlockMask.from_kv_blocks(
        *listed(full, blocks - full), *listed(0, full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(nodes, slots)
    )
    torch._dynamo.reset()  # after eight shapes it would no longer compile, and be timed uncompiled
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda a: attend(a["query"], a["key"], a["value"], block_mask=mask, enable_gqa=True).transpose(1, 2)  # type: ignore[union-attr]


def flash_then_tree(arguments: Arguments) -> Call:
    """Flash attention over the prefix without a mask, the tree densely, merged by their log-sum-exps: the strongest."""
    length, groups = int(arguments["lengths"][0]), arguments["query"].shape[1] // arguments["key"].shape[1]
    nodes = arguments["query"].shape[2]
    tree = _mask(arguments)[:, :, None, :, length:]  # [batch, 1, 1, node, node]
    scale = arguments["query"].shape[3] ** -0.5
    aten = torch.ops.aten
    flash = (
        aten._scaled_dot_product_flash_attention
        if arguments["query"].is_cuda
        else aten._scaled_dot_product_flash_attention_for_cpu
    )

    def call(a: Arguments) -> Tensor:
        grouped = a["query"].unflatten(1, (-1, groups))  # [batch, kv_heads, group, node, head_dim]
        key, value = a["key"], a["value"]
        prefix, prefix_lse = flash(grouped.flatten(2, 3), key[:, :, :length], value[:, :, :length])[:2]
        scores = grouped.float() @ key[:, :, None, length:].transpose(3, 4).float() * scale
        scores = scores.masked_fill(~tree, -torch.inf)
        lse = scores.logsumexp(-1)  # [batch, kv_heads, group, node]
        own = ((scores - lse[..., None]).exp().to(value.dtype) @ value[:, :, None, length:]).float()
        share = torch.sigmoid(prefix_lse.unflatten(2, (groups, nodes)) - lse)[..., None]
        merged = own + share * (prefix.unflatten(2, (groups, nodes)) - own)
        return merged.to(value.dtype).flatten(1, 2).transpose(1, 2)

    return call


BASELINES: dict[str, Callable[[Arguments], Call]] = {
    "transformers sdpa": transformers_sdpa,
    "sdpa cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa math": partial(sdpa, SDPBackend.MATH),
    "flex": flex,
    "flash + tree + merge": flash_then_tree,
}


def _mask(arguments: Arguments) -> Tensor:
    """[batch, 1, node, slot] bool; the baselines have neither windows, softcaps nor sinks."""
    slots = arguments["key"].shape[2]
    return reference.visible(arguments["first"], arguments["lengths"], arguments["ancestors"], slots)[:, None]
