"""The ops `specdec::linear_bf16`, `linear_int8`, `linear_int4`: a few tokens times a matrix stored in fewer bits.

On a CPU they are as fast as memory gives what is stored with AVX-512, integers with its instructions for them (VNNI), and right
on every CPU. There are kernels for integers on CUDA devices too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec_kernels.cpu import define
from specdec_kernels.reference import stored_linear as reference

_bf16 = define("linear_bf16", "(Tensor x, Tensor weight, int out) -> Tensor", reference.linear_bf16)
_int8 = define("linear_int8", "(Tensor x, Tensor weight, Tensor scale, int out) -> Tensor", reference.linear_int8)
_int4 = define("linear_int4", "(Tensor x, Tensor weight, Tensor scales, int out) -> Tensor", reference.linear_int4)


def linear_bf16(x: Tensor, weight: Tensor, out: int) -> Tensor:
    """See `specdec_kernels.reference.linear_bf16`."""
    _check(x, weight, out, weight.shape[1] * 2, 2)
    return _bf16(x, weight, out)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, out: int) -> Tensor:
    """See `specdec_kernels.reference.linear_int8`."""
    _check(x, weight, out, weight.shape[1] * 4, 32)
    return _int8(x, weight, scale, out)


def linear_int4(x: Tensor, weight: Tensor, scales: Tensor, out: int) -> Tensor:
    """See `specdec_kernels.reference.linear_int4`."""
    _check(x, weight, out, weight.shape[1] * 32, 32)
    return _int4(x, weight, scales, out)


def _check(x: Tensor, weight: Tensor, out: int, inputs: int, step: int) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"x {x.dtype}: only float32 has a kernel; pass x.float().")
    if not 0 <= inputs - x.shape[-1] < step or not 0 <= len(weight) * 16 - out < 16:
        raise ValueError(
            f"x {[*x.shape]}, out {out}: the matrix has up to {len(weight) * 16} outputs, {inputs} inputs."
        )


def _on_gpu(x: Tensor, weight: Tensor, scales: Tensor, out: int) -> Tensor:
    from specdec_kernels.backend import on
    from specdec_kernels.triton.stored_linear import stored_linear

    with on(x):
        found = stored_linear(x.reshape(-1, x.shape[-1]).contiguous(), weight, scales, out)
    return found.view(*x.shape[:-1], out)


torch.library.impl("specdec::linear_int8", "CUDA", _on_gpu)
torch.library.impl("specdec::linear_int4", "CUDA", _on_gpu)


def _empty(x: Tensor, *stored: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], stored[-1])


for _name in ("linear_bf16", "linear_int8", "linear_int4"):
    torch.library.register_fake(f"specdec::{_name}")(_empty)
