"""Attention of tree nodes over a prefix and their own ancestors: the specification, and the same under a dense bias."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERIES = 256  # whose scores `biased_attention` writes out at a time


def tree_attention(
    query: Tensor,  # [batch, heads, node, head_dim]
    key: Tensor,  # [batch, kv_heads, slot, head_dim]
    value: Tensor,  # [batch, kv_heads, slot, value_dim]
    first: Tensor,  # [batch, node] int32: first slot of the prefix that is seen, 0 unless there is a sliding window
    lengths: Tensor,  # [batch] int32: slots of the prefix
    ancestors: Tensor,  # [batch, node, word] int32: bit j % 32 of word j // 32 is set when slot lengths[b] + j is seen
    scale: float | None = None,  # default head_dim ** -0.5
    softcap: float | None = None,  # scores become softcap * tanh(scores / softcap)
    sinks: Tensor | None = None,  # [heads]: a logit that takes part in the softmax and contributes nothing
) -> tuple[Tensor, Tensor]:
    """Softmax attention with grouped heads, in the precision of the query but no less than float32.

    Slots that no node sees are not read: they may hold anything. A node that sees nothing gets zeros.

    Returns:
        [batch, node, heads, value_dim], and the log of what the softmax divides by, [batch, node, heads] in at least float32.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    seen = visible(first, lengths, ancestors, key.shape[2])[:, None, None]  # [batch, 1, 1, node, slot]
    unread = ~seen.any(3).transpose(2, 3)  # [batch, 1, slot, 1]
    grouped = query.to(exact).unflatten(1, (key.shape[1], -1))  # [batch, kv_heads, group, node, head_dim]
    scores = torch.einsum("bhgtd,bhsd->bhgts", grouped, key.to(exact).masked_fill(unread, 0))
    scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)  # [batch, kv_heads, group, node]
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(exact).view(1, key.shape[1], -1, 1))
    weights = (scores - lse.clamp(min=torch.finfo(exact).min)[..., None]).exp()
    out = torch.einsum("bhgts,bhsv->bthgv", weights, value.to(exact).masked_fill(unread, 0))
    return out.flatten(2, 3).to(query.dtype), lse.flatten(1, 2).transpose(1, 2).contiguous()


def visible(first: Tensor, lengths: Tensor, ancestors: Tensor, slots: int) -> Tensor:
    """[batch, node, slot] bool: what the arguments of `tree_attention` of these names say of `slots` slots."""
    slot = torch.arange(slots, device=lengths.device)
    node = (slot - lengths[:, None])[:, None]  # [batch, 1, slot]
    words = (node >> 5).clamp(0, ancestors.shape[2] - 1).expand(-1, ancestors.shape[1], -1)
    bits = (ancestors.gather(2, words) >> (node & 31)) & 1
    prefix = (node < 0) & (slot >= first[..., None])
    return prefix | ((node >= 0) & (node < 32 * ancestors.shape[2]) & (bits > 0))


def pack(ancestors: Tensor) -> Tensor:
    """[..., word] int32 from [..., node] bool: the words of `tree_attention`."""
    bits = torch.nn.functional.pad(ancestors, (0, -ancestors.shape[-1] % 32)).unflatten(-1, (-1, 32))
    places = torch.arange(32, device=ancestors.device)
    return (bits.to(torch.int64) << places).sum(-1).to(torch.int32)  # bit 31 is the sign


def biased_attention(
    query: Tensor,  # [batch, heads, node, head_dim]
    key: Tensor,  # [batch, kv_heads, slot, head_dim]
    value: Tensor,  # [batch, kv_heads, slot, value_dim]
    bias: Tensor,  # [batch, 1, node, slot]: 0 where a node sees a slot, -inf where it does not
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads]
) -> Tensor:
    """`tree_attention` for whatever a bias can say, shared by layers. Every slot is read. [batch, node, heads, value_dim].

    No memory but the bias grows with all nodes times slots.
    """
    batch, heads, nodes, head_dim = query.shape
    groups = heads // key.shape[1]
    if softcap is None and sinks is None:
        # On a GPU only torch's math kernel, which writes out all scores, takes both a mask and shared heads.
        shared = query.device.type == "cpu"
        if not shared:
            key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=shared)
        return out.transpose(1, 2)
    if nodes > QUERIES:
        parts = zip(query.split(QUERIES, 2), bias.split(QUERIES, 2), strict=True)
        return torch.cat([biased_attention(part, key, value, b, scale, softcap, sinks) for part, b in parts], 1)
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
