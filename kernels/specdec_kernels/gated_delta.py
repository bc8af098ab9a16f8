"""The op `specdec::gated_delta`: nodes read states by the gated delta rule. They are folded as in linear attention.

On CUDA devices too, the specification computes what there is no kernel for: see `specdec_kernels.recurrences.supports`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec_kernels.recurrences import check, supports
from specdec_kernels.reference import gated_delta as reference


@torch.library.custom_op(
    "specdec::gated_delta", mutates_args=("state", "update"), device_types="cuda",
    schema="(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor(a!) state, Tensor ancestors,"
    " Tensor(b!) update, Tensor[]? fold=None) -> Tensor",
)  # fmt: skip
def gated_delta(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor, ancestors: Tensor,
    update: Tensor, fold: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """See `specdec_kernels.reference.gated_delta`."""
    if not supports(state, decay, key.shape[1], fold):
        return _specified(query, key, value, decay, beta, state, ancestors, update, fold)
    from specdec_kernels.backend import on
    from specdec_kernels.triton import gated_delta as kernel

    _check(query, key, value, decay, beta, state, ancestors, update, fold)
    with on(state):
        return kernel.gated_delta(query, key, value, decay, beta, state, ancestors, update, fold)


@gated_delta.register_kernel("cpu")
def _specified(query, key, value, decay, beta, state, ancestors, update, fold=None):
    _check(query, key, value, decay, beta, state, ancestors, update, fold)
    return reference.gated_delta(query, key, value, decay, beta, state, ancestors, update, fold).contiguous()


@gated_delta.register_fake
def _(query, key, value, decay, beta, state, ancestors, update, fold=None):
    _check(query, key, value, decay, beta, state, ancestors, update, fold)
    return state.new_empty(value.shape)


def _check(query, key, value, decay, beta, state, ancestors, update, fold) -> None:
    last, every = {"query": query, "value": value, "beta": beta}, {"key": key, "decay": decay, "update": update}
    check("gated_delta", state, last, every, ancestors, fold)
