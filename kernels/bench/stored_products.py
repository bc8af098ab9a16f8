"""Calls of products with matrices stored in integers, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from floors import Product
from torch import Tensor

from specdec_kernels.reference import stored_linear as reference

TOLERANCE = 1e-5  # of a result, norm over norm, against the reference: sums of float32 in another order
DRY = [Product(op, 3, 40, 70) for op in ("linear_int8", "linear_int4")]


def inputs(shape: Product, device: str, seed: int) -> tuple[Any, ...]:
    """What the op is called with: tokens, the matrix, its scales, and how many outputs it has."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(shape.out, shape.inputs, generator=generator, device=device)
    pack = getattr(reference, f"pack_{shape.op.removeprefix('linear_')}")
    return torch.randn(shape.tokens, shape.inputs, generator=generator, device=device), *pack(weight), shape.out


def fault(shape: Product, call: Callable[..., Tensor], arguments: tuple[Any, ...]) -> str | None:
    """What is wrong with what a call returns, if anything is."""
    found, due = call(*arguments).double(), getattr(reference, shape.op)(*arguments).double()
    off = float((found - due).norm() / due.norm())
    return None if off < TOLERANCE else f"result off by {off:.1e}, rounding by at most {TOLERANCE:.0e}"
