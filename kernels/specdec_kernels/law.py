"""The op `specdec::law`: temperature, top-k, top-p and min-p as three numbers per row."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.reference import law as reference


@torch.library.custom_op("specdec::law", mutates_args=(), device_types="cuda")
def law(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    from specdec_kernels.backend import on
    from specdec_kernels.triton import law as kernel

    with on(logits):
        return kernel.law(logits, temperature, top_k, top_p, min_p)


law.register_kernel("cpu")(reference.law)


@law.register_fake
def _(logits, temperature, top_k=None, top_p=None, min_p=None):
    return logits.new_empty((len(logits), 3), dtype=torch.float64), logits.new_empty(len(logits), dtype=torch.int64)
