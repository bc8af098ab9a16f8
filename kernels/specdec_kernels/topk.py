"""The op `specdec::topk`: log-softmax and the k most probable tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.reference import topk as reference


@torch.library.custom_op("specdec::topk", mutates_args=(), device_types="cuda")
def topk(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """See `specdec_kernels.reference.topk`."""
    from specdec_kernels.backend import on
    from specdec_kernels.triton import topk as kernel

    with on(logits):
        return kernel.topk(logits, k, temperature)


topk.register_kernel("cpu")(reference.topk)


@topk.register_fake
def _(logits, k, temperature=1.0):
    shape = len(logits), k
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)
