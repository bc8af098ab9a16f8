"""The op `specdec::linear`: a few tokens times a matrix on a CPU, as fast as memory gives the matrix."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("specdec::linear", mutates_args=(), device_types="cpu")
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `specdec_kernels.reference.linear`; float32."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {[*x.shape]}, weight {[*weight.shape]}: expected [token, in] and [out, in].")
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise ValueError(f"x {x.dtype}, weight {weight.dtype}: only float32 has a kernel; use x @ weight.T.")
    x, weight, result = x.contiguous(), weight.contiguous(), x.new_empty(len(x), len(weight))
    pointers = x.data_ptr(), weight.data_ptr(), result.data_ptr()
    _kernel()(*pointers, len(x), *weight.shape, torch.get_num_threads())
    return result


@linear.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight))


@cache
def _kernel(*macros: str) -> Any:
    """Compiled for this machine as torch.compile compiles its own kernels, and kept where it keeps those."""
    from torch._inductor.codecache import CppCodeCache

    source = files("specdec_kernels").joinpath("cpu/linear.cpp").read_text("utf-8")
    run: Any = CppCodeCache.load("\n".join([*macros, source])).linear
    run.argtypes, run.restype = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, ctypes.c_int], None
    return run
