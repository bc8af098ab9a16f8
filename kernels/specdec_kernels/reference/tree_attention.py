"""Attention of tree nodes over a prefix and their own ancestors, given as an additive bias."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def tree_attention(
    query: Tensor,  # [batch, heads, node, head_dim]
    key: Tensor,  # [batch, kv_heads, slot, head_dim]
    value: Tensor,  # [batch, kv_heads, slot, value_dim]
    bias: Tensor,  # [batch, 1, node, slot]: 0 where a node sees a slot, -inf where it does not
    scale: float | None = None,  # default head_dim ** -0.5
    softcap: float | None = None,  # scores become softcap * tanh(scores / softcap)
    sinks: Tensor | None = None,  # [heads]: a logit that takes part in the softmax and contributes nothing
) -> Tensor:
    """Softmax attention with grouped heads. Returns [batch, node, heads, value_dim]."""
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    batch, heads, nodes, head_dim = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(batch, key.shape[1], groups * nodes, head_dim)
    scores = packed @ key.transpose(2, 3) * (head_dim**-0.5 if scale is None else scale)
    scores = scores.view(batch, heads, nodes, key.shape[2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, -1, nodes, 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    packed = weights[..., : key.shape[2]].reshape(batch, key.shape[1], groups * nodes, key.shape[2])
    return (packed @ value).view(batch, heads, nodes, value.shape[3]).transpose(1, 2)
