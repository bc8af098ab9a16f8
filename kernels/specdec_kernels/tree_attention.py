"""The op `specdec::tree_attention`: the specification on CPU, Triton on CUDA devices, opaque to the compiler."""

from __future__ import annotations

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
    query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor, lengths: Tensor, first: Tensor | None = None,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of tree nodes over a prefix and their own ancestors: see `specdec_kernels.reference.tree_attention`."""
    _check(query, key, value, ancestors, lengths, first, sinks)
    from specdec_kernels.triton.tree_attention import tree_attention

    return tree_attention(query, key, value, ancestors, lengths, first, scale, softcap, sinks)


@tree_attention.register_kernel("cpu")
def _(query, key, value, ancestors, lengths, first=None, scale=None, softcap=None, sinks=None):
    _check(query, key, value, ancestors, lengths, first, sinks)
    out, lse = reference.tree_attention(query, key, value, ancestors, lengths, first, scale, softcap, sinks)
    return out.contiguous(), lse


@tree_attention.register_fake
def _(query, key, value, ancestors, lengths, first=None, scale=None, softcap=None, sinks=None):
    _check(query, key, value, ancestors, lengths, first, sinks)
    shape = query.shape[0], query.shape[2], query.shape[1]  # [batch, node, heads]
    lse = query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(*shape, value.shape[3]), lse


def _check(
    query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor, lengths: Tensor, first: Tensor | None, sinks: Tensor | None
) -> None:  # fmt: skip
    """Raise ValueError unless the kernel computes what it is asked for; on CPU any heads and dtypes will do."""
    given = {"query": query, "key": key, "value": value, "ancestors": ancestors, "lengths": lengths, "first": first,
             "sinks": sinks}  # fmt: skip
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    wrong = _misshapen(tensors)
    if not wrong:
        wrong = [*_mistyped(tensors), *_scattered(tensors)]
        nodes = max(query.shape[2], 32 * ancestors.shape[2])
        if nodes > MAX_NODES:
            wrong.append(f"a tree of {nodes} nodes has more than {MAX_NODES}: use biased_attention")
        dims = query.shape[3], value.shape[3]
        if query.device.type != "cpu" and not supports(query.dtype, *dims):
            limits = f"float16, bfloat16 or float32 and multiples of 8 up to {MAX_HEAD_DIM}"
            wrong.append(f"{query.dtype} heads of {dims[0]} and {dims[1]} are not {limits}: use the reference")
    if wrong:
        raise ValueError(f"tree_attention: {'; '.join(wrong)}.")


def _misshapen(tensors: dict[str, Tensor]) -> list[str]:
    axes = {"query": 4, "key": 4, "value": 4, "ancestors": 3, "lengths": 1, "first": 2, "sinks": 1}
    if wrong := [f"{name} has {x.ndim} axes, not {axes[name]}" for name, x in tensors.items() if x.ndim != axes[name]]:
        return wrong
    batch, heads, nodes, head_dim = tensors["query"].shape
    kv_heads, slots, value_dim = (*tensors["key"].shape[1:3], tensors["value"].shape[3])
    due = {
        "query": (batch, heads, nodes, head_dim), "key": (batch, kv_heads, slots, head_dim),
        "value": (batch, kv_heads, slots, value_dim), "ancestors": (batch, nodes, tensors["ancestors"].shape[2]),
        "lengths": (batch,), "first": (batch, nodes), "sinks": (heads,),
    }  # fmt: skip
    wrong = [f"{name} is {list(x.shape)}, not {list(due[name])}" for name, x in tensors.items() if x.shape != due[name]]
    if heads % kv_heads:
        wrong.append(f"{heads} heads cannot share {kv_heads} KV heads evenly: repeat the KV heads")
    return wrong


def _mistyped(tensors: dict[str, Tensor]) -> list[str]:
    query = tensors["query"]
    due = {"query": query.dtype, "key": query.dtype, "value": query.dtype, "sinks": None}
    due = {name: due.get(name, torch.int32) or x.dtype for name, x in tensors.items()}
    wrong = [f"{name} is {x.dtype}, not {due[name]}: cast it" for name, x in tensors.items() if x.dtype != due[name]]
    away = [
        f"{name} is on {x.device}, not on {query.device}: move it"
        for name, x in tensors.items()
        if x.device != query.device
    ]
    return wrong + away


def _scattered(tensors: dict[str, Tensor]) -> list[str]:
    """Heads may be views of any layout whose last axis is dense; what describes the tree is contiguous."""
    return [
        f"{name} has strides {x.stride()}: call .contiguous()"
        for name, x in tensors.items()
        if not (x.stride(3) == 1 if name in ("query", "key", "value") else x.is_contiguous())
    ]
