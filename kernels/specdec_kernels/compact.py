"""The op `specdec::compact`: accepted nodes move to the front of the scratch, in place, all layers in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.reference import compact as reference


@torch.library.custom_op("specdec::compact", mutates_args=("stack",), device_types="cuda")
def compact(stack: Tensor, path: Tensor, lengths: Tensor, count: Tensor) -> None:
    """See `specdec_kernels.reference.compact`."""
    from specdec_kernels.backend import on
    from specdec_kernels.triton import compact as kernel

    with on(stack):
        kernel.compact(stack, path, lengths, count)


compact.register_kernel("cpu")(reference.compact)


@compact.register_fake
def _(stack, path, lengths, count):
    return None
