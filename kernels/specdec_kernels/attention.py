"""The op `specdec::attention`: `tree_attention` of a few nodes on a CPU, as fast as memory gives keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec_kernels.cpu import define
from specdec_kernels.reference.tree_attention import tree_attention
from specdec_kernels.tree_attention import check

WIDTH = 16  # floats of the widest vectors: value_dim is a multiple of it
DTYPES = (torch.float32, torch.bfloat16)


def _reference(*args: Any) -> Tensor:
    found, _ = tree_attention(*args[:7], softcap=args[7] or None, sinks=args[8])
    return found


_op = define(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor first, Tensor lengths, Tensor ancestors, float scale, float softcap, "
    "Tensor? sinks) -> Tensor",
    _reference,
)


def serves(dtype: torch.dtype, value_dim: int) -> bool:
    """Whether there is a kernel for such values."""
    return dtype in DTYPES and value_dim % WIDTH == 0


def attention(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, lengths: Tensor, ancestors: Tensor,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The output of `specdec_kernels.reference.tree_attention`; `serves` says for what.

    Slots before the first and behind the last that a batch row's nodes see are not read, so that the room in a cache costs
    nothing. Sums are in float32.
    """
    if not torch.compiler.is_compiling():  # which asks below
        check(query, key, value, first, lengths, ancestors, sinks)
    if not serves(query.dtype, value.shape[3]):
        raise ValueError(
            f"attention: values of {value.shape[3]} {query.dtype} are not float32 or bfloat16 in multiples of {WIDTH}; use "
            "specdec_kernels.reference.tree_attention."
        )
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return _op(
        query, key, value, first, lengths, ancestors, scale, softcap or 0.0, None if sinks is None else sinks.float()
    )


@torch.library.register_fake("specdec::attention")
def _(query, key, value, first, lengths, ancestors, scale, softcap, sinks):
    check(query, key, value, first, lengths, ancestors, sinks)
    batch, heads, nodes, _ = query.shape
    return query.new_empty(batch, nodes, heads, value.shape[3])
