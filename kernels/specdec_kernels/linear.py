"""The op `specdec::linear`: a few tokens times a matrix on a CPU, as fast as memory gives the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.cpu import define
from specdec_kernels.reference import linear as reference

# For so many tokens and at least so many weights it is as fast as what torch calls or up to three times as fast (measured on
# CPUs with AVX-512 of two makers). Where a CPU has matrix units, torch's products of bfloat16 use those.
_DTYPES = torch.float32, torch.bfloat16
_FEW = range(1, 33)
_LARGE = 1 << 16
_op = define("linear", "(Tensor x, Tensor weight) -> Tensor", reference.linear)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `specdec_kernels.reference.linear`; float32 or bfloat16."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {[*x.shape]}, weight {[*weight.shape]}: expected [token, in] and [out, in].")
    if x.dtype != weight.dtype or x.dtype not in _DTYPES:
        raise ValueError(f"x {x.dtype}, weight {weight.dtype}: only float32 and bfloat16 have a kernel; use @.")
    return _op(x, weight)


def pays(tokens: int, x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is faster than torch for so many rows of x, which may have more dimensions than two."""
    here = x.device.type == weight.device.type == "cpu"
    suits = x.dtype == weight.dtype and x.dtype in _DTYPES and tokens in _FEW and weight.is_contiguous()
    slow = x.dtype == torch.float32 or not torch.cpu._is_amx_tile_supported()
    return here and suits and slow and weight.numel() >= _LARGE


@torch.library.register_fake("specdec::linear")
def _(x, weight):
    return x.new_empty(len(x), len(weight))
