"""The ops `specdec::linear_attention` and `specdec::fold_linear_attention`: nodes read states, accepted ones enter them.

On CUDA devices too, the specification computes what there is no kernel for: see `specdec_kernels.recurrences.supports`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec_kernels.recurrences import check, supports
from specdec_kernels.reference import linear_attention as reference


@torch.library.custom_op(
    "specdec::linear_attention", mutates_args=("state",), device_types="cuda",
    schema="(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor(a!) state, Tensor ancestors, Tensor[]? fold=None)"
    " -> Tensor",
)  # fmt: skip
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, state: Tensor, ancestors: Tensor,
    fold: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """See `specdec_kernels.reference.linear_attention`."""
    if not supports(state, decay, key.shape[1], fold):
        return _specified(query, key, value, decay, state, ancestors, fold)
    from specdec_kernels.backend import on
    from specdec_kernels.triton import linear_attention as kernel

    _check(query, key, value, decay, state, ancestors, fold)
    with on(state):
        return kernel.linear_attention(query, key, value, decay, state, ancestors, fold)


@linear_attention.register_kernel("cpu")
def _specified(query, key, value, decay, state, ancestors, fold=None):
    _check(query, key, value, decay, state, ancestors, fold)
    return reference.linear_attention(query, key, value, decay, state, ancestors, fold).contiguous()


@linear_attention.register_fake
def _(query, key, value, decay, state, ancestors, fold=None):
    _check(query, key, value, decay, state, ancestors, fold)
    return state.new_empty(*query.shape[:2], *value.shape[2:])


def _check(query, key, value, decay, state, ancestors, fold) -> None:
    every = {"key": key, "value": value, "decay": decay}
    check("linear_attention", state, {"query": query}, every, ancestors, fold)


@torch.library.custom_op("specdec::fold_linear_attention", mutates_args=("state",), device_types="cuda")
def fold_linear_attention(
    state: Tensor, key: Tensor, value: Tensor, decay: Tensor, path: Tensor, count: Tensor
) -> None:  # fmt: skip
    """See `specdec_kernels.reference.linear_attention`."""
    fold = key, value, decay, path, count
    if not supports(state, decay, 0, fold):
        return _fold_specified(state, *fold)
    from specdec_kernels.backend import on
    from specdec_kernels.triton import linear_attention as kernel

    check("fold_linear_attention", state, {}, {}, None, fold)
    with on(state):
        kernel.fold_linear_attention(state, *fold)


@fold_linear_attention.register_kernel("cpu")
def _fold_specified(state, *fold):
    check("fold_linear_attention", state, {}, {}, None, fold)
    reference.fold_linear_attention(state, *fold)


@fold_linear_attention.register_fake
def _(state, *fold):
    check("fold_linear_attention", state, {}, {}, None, fold)
