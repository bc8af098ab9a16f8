"""Times products with matrices stored in integers beside their floors and one in bfloat16: `make engine` runs it.

python kernels/bench/bench_stored_linear.py --seconds 60
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import processes
import report
import torch
from floors import Product
from torch import Tensor

import specdec_kernels
from specdec_kernels.reference import stored_linear as reference

OPS = ("linear_int8", "linear_int4")
HALF = "bfloat16"
# of a result, norm over norm, against the reference: sums of float32 in another order; and 8 bits of tokens and weights
TOLERANCE = {processes.OURS: 1e-5, HALF: 2e-2}
ROTATED = 200 << 20  # bytes that calls go through in turn: several times an L2 cache
DRY = [Product(op, 3, 40, 70) for op in OPS]


def shapes_of(method: str, dry: bool) -> list[Product]:
    """The most telling first."""
    return DRY if dry else [Product(op, tokens) for tokens in (64, 1, 16) for op in OPS]


def inputs(shape: Product, device: str, seed: int) -> tuple[Any, ...]:
    """What the op is called with: tokens, the matrix, its scales, and how many outputs it has."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(shape.out, shape.inputs, generator=generator, device=device)
    pack = getattr(reference, f"pack_{shape.op.removeprefix('linear_')}")
    return torch.randn(shape.tokens, shape.inputs, generator=generator, device=device), *pack(weight), shape.out


def prepared(shape: Product, method: str, arguments: tuple[Any, ...]) -> Callable[[], Tensor]:
    """The call of a method on what an op is called with. In bfloat16 the matrix is unpacked before."""
    if method == processes.OURS:
        return lambda: getattr(specdec_kernels, shape.op)(*arguments)
    x, *stored, out = arguments
    unpack = getattr(reference, f"unpack_{shape.op.removeprefix('linear_')}")
    half, weight = x.bfloat16(), unpack(*stored)[:out, : shape.inputs].bfloat16()
    return lambda: torch.nn.functional.linear(half, weight)


def fault(
    shape: Product, call: Callable[..., Tensor], arguments: tuple[Any, ...], most: float = TOLERANCE[processes.OURS]
) -> str | None:
    """What is wrong with what a call returns, if anything is."""
    found, due = call(*arguments).double(), getattr(reference, shape.op)(*arguments).double()
    off = float((found - due).norm() / due.norm())
    return None if off < most else f"result off by {off:.1e}, rounding by at most {most:.0e}"


def figures(shape: Product, method: str, device: str) -> dict[str, Any]:
    """Of calls that go through several matrices in turn; raises if a result is wrong or refused."""
    count = max(4, math.ceil(ROTATED / shape.bytes)) if device == "cuda" else 4
    turns = [inputs(shape, device, seed) for seed in range(count)]
    calls = [prepared(shape, method, arguments) for arguments in turns]
    if wrong := fault(shape, lambda *_: calls[0](), turns[0], TOLERANCE[method]):
        raise RuntimeError(f"wrong: {wrong}")
    return report.figures(shape, report.measure(calls, device))


BENCHMARK = processes.Benchmark(
    __file__, "kernels_{gpu}_{date}_stored_linear", ("stored_linear",), tuple(TOLERANCE), shapes_of, figures, {}
)

if __name__ == "__main__":
    processes.main(BENCHMARK, 60)
