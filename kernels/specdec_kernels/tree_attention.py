"""The op `specdec::tree_attention`: the specification on CPU, Triton on CUDA devices, opaque to the compiler."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specdec_kernels.reference import tree_attention as reference

MAX_NODES = 256  # tree nodes, and queries, of one call
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(dtype: torch.dtype, head_dim: int, value_dim: int) -> bool:
    """Whether there is a kernel for such heads; the specification runs on every device."""
    return dtype in DTYPES and all(dim <= MAX_HEAD_DIM and dim % 8 == 0 for dim in (head_dim, value_dim))


@torch.library.custom_op("specdec::tree_attention", mutates_args=(), device_types="cuda")
def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, lengths: Tensor, ancestors: Tensor,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of tree nodes over a prefix and their own ancestors: see `specdec_kernels.reference.tree_attention`."""
    check(query, key, value, first, lengths, ancestors, sinks)
    from specdec_kernels.backend import on
    from specdec_kernels.triton.tree_attention import tree_attention

    with on(query):
        return tree_attention(query, key, value, first, lengths, ancestors, scale, softcap, sinks)


@tree_attention.register_kernel("cpu")
def _(query, key, value, first, lengths, ancestors, scale=None, softcap=None, sinks=None):
    check(query, key, value, first, lengths, ancestors, sinks)
    out, lse = reference.tree_attention(query, key, value, first, lengths, ancestors, scale, softcap, sinks)
    return out.contiguous(), lse


@tree_attention.register_fake
def _(query, key, value, first, lengths, ancestors, scale=None, softcap=None, sinks=None):
    check(query, key, value, first, lengths, ancestors, sinks)
    shape = query.shape[0], query.shape[2], query.shape[1]  # [batch, node, heads]
    lse = query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(*shape, value.shape[3]), lse


def check(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, lengths: Tensor, ancestors: Tensor, sinks: Tensor | None
) -> None:  # fmt: skip
    """Raise ValueError unless the kernel computes what it is asked for; on CPU any heads and dtypes will do."""
    batch, heads, nodes, head_dim = (*query.shape, 0, 0, 0, 0)[:4]
    kv_heads, slots = (*key.shape, 0, 0, 0)[1:3]
    value_dim, words = value.shape[-1], ancestors.shape[-1]
    due = {
        "query": (query, (batch, heads, nodes, head_dim), query.dtype),
        "key": (key, (batch, kv_heads, slots, head_dim), query.dtype),
        "value": (value, (batch, kv_heads, slots, value_dim), query.dtype),
        "first": (first, (batch, nodes), torch.int32),
        "lengths": (lengths, (batch,), torch.int32),
        "ancestors": (ancestors, (batch, nodes, words), torch.int32),
    }
    if sinks is not None:
        due["sinks"] = (sinks, (heads,), sinks.dtype)
    wrong = [fault for name, what in due.items() for fault in _faults(name, query.device, *what)]
    if heads % max(kv_heads, 1):
        wrong.append(f"{heads} heads cannot share {kv_heads} KV heads evenly: repeat the KV heads")
    if max(nodes, 32 * words) > MAX_NODES:
        wrong.append(f"{nodes} nodes with words for {32 * words} are more than {MAX_NODES}: use biased_attention")
    if query.device.type != "cpu" and not supports(query.dtype, head_dim, value_dim):
        limits = f"float16, bfloat16 or float32 in multiples of 8 up to {MAX_HEAD_DIM}"
        wrong.append(f"heads of {head_dim} and {value_dim} {query.dtype} are not {limits}: use the reference")
    if wrong:
        raise ValueError(f"tree_attention: {'; '.join(wrong)}.")


def _faults(name: str, device: torch.device, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[str]:
    if tuple(x.shape) != shape:
        yield f"{name} is {list(x.shape)}, not {list(shape)}"
    if x.dtype != dtype:
        yield f"{name} is {x.dtype}, not {dtype}: cast it"
    if x.device != device:
        yield f"{name} is on {x.device}, not on {device}: move it"
    if x.ndim > 2 and x.stride(-1) != 1:
        yield f"{name} has stride {x.stride(-1)} in its last axis, not 1: call .contiguous()"
