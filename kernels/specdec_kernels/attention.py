"""The op `specdec::attention`: attention of a few nodes on a CPU, as fast as memory gives keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.cpu import define

WIDTH = 16  # floats of the widest vectors: value_dim is a multiple of it
NODES = 24  # most nodes for which it is known to be faster than torch's
DTYPES = {torch.float32, torch.bfloat16}
_op = define("attention", "(Tensor query, Tensor key, Tensor value, Tensor bias, float scale) -> Tensor")


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """See `specdec_kernels.reference.tree_attention.biased_attention`, without softcap and sinks.

    All operands are float32, or all bfloat16; sums are float32.

    Slots before the first and behind the last that a batch row's nodes see are not read. A node that sees nothing gets zeros.
    """
    wrong = refusals(query, key, value, bias)
    if wrong:
        raise ValueError("; ".join(wrong) + ".")
    return _op(query, key, value, bias, query.shape[3] ** -0.5 if scale is None else scale)


def refusals(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> list[str]:
    """What of these there is no kernel for."""
    tensors = {"query": query, "key": key, "value": value, "bias": bias}
    if any(x.dim() != 4 for x in tensors.values()):
        return [f"{name} {[*x.shape]}: expected four dimensions" for name, x in tensors.items() if x.dim() != 4]
    dtypes = {x.dtype for x in tensors.values()}
    wrong = []
    if len(dtypes) > 1 or not dtypes <= DTYPES:
        each = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        wrong.append(f"{each}: there are kernels for float32 and for bfloat16 throughout")
    batch, heads, nodes, dim = query.shape
    kv_heads, slots, value_dim = key.shape[1], *value.shape[2:]
    if key.shape != (batch, kv_heads, slots, dim) or value.shape != (batch, kv_heads, slots, value_dim):
        wrong.append(f"query {[*query.shape]}, key {[*key.shape]}, value {[*value.shape]}: they do not fit")
    if kv_heads == 0 or heads % kv_heads:
        wrong.append(f"{heads} heads are not shared out among {kv_heads}")
    if bias.shape != (batch, 1, nodes, slots):
        wrong.append(f"bias {[*bias.shape]}: expected {[batch, 1, nodes, slots]}")
    if value_dim % WIDTH:
        wrong.append(f"values of {value_dim} are not whole vectors of {WIDTH}")
    return wrong


@torch.library.register_fake("specdec::attention")
def _(query, key, value, bias, scale):
    batch, heads, nodes, _ = query.shape
    return query.new_empty(batch, nodes, heads, value.shape[3])
