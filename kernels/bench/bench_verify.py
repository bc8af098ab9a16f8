"""Times laws, verification and compaction beside their floors and rivals on a GPU: `make gpu` runs it after the tests.

python kernels/bench/bench_verify.py --seconds 90
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import processes
import report
import verification
from floors import Compaction, Laws

ROTATED = 200 << 20  # bytes that calls go through in turn: several times an L2 cache
DRY = [Compaction("compact", 3, layers=2, kv_heads=2, head_dim=4, kept=4)] + [
    Laws(op, "top-p", "IID", 6, nodes=9, vocab=60, width=3) for op in ("law", "verify")
]
TARGET = "verify (laws, walk and draw) of 64 nodes x 128k tokens within 60 us"


def shapes() -> Iterator[Laws | Compaction]:
    """The most telling first: what time does not suffice for is left out and named."""
    for batch in (1, 8):
        yield Laws("verify", "greedy", "POINT", batch)
        yield Laws("verify", "temperature", "POINT", batch)
        yield Laws("verify", "temperature", "WITHOUT_REPLACEMENT", batch)
        yield Compaction("compact", batch)
        for sampling in verification.SAMPLINGS:
            yield Laws("law", sampling, "", batch)
        for sampling in ("top-p", "top-k"):
            yield Laws("verify", sampling, "POINT", batch)
        for sampling, children in (("temperature", "IID"), ("temperature", "SAMPLED_THEN_TOP"), ("top-p", "IID")):
            yield Laws("verify", sampling, children, batch)


def shapes_of(method: str, dry: bool) -> list[Laws | Compaction]:
    """Those that this method computes."""
    return [shape for shape in (DRY if dry else shapes()) if method in verification.candidates(shape)]


def figures(shape: Laws | Compaction, method: str, device: str) -> dict[str, Any]:
    """Of calls that go through several inputs in turn; raises if a result is wrong or refused."""
    turns, call = buffers(shape, device), verification.candidates(shape)[method]
    if fault := verification.fault(shape, call, turns):
        raise RuntimeError(f"wrong: {fault}")
    return report.figures(shape, report.measure([lambda turn=turn: call(*turn) for turn in turns], device))


def buffers(shape: Laws | Compaction, device: str) -> list[verification.Arguments]:
    """Arguments of as many calls as go through `ROTATED` bytes, at least 4."""
    calls = max(4, math.ceil(ROTATED / shape.bytes)) if device == "cuda" else 4
    if isinstance(shape, Compaction):
        return verification.compact_inputs(shape, device, 0, calls)
    draw = verification.law_inputs if shape.op == "law" else verification.verify_inputs
    return [draw(shape, device, seed) for seed in range(calls)]


BENCHMARK = processes.Benchmark(
    __file__, "kernels_{gpu}_{date}_verification", ("law", "verify", "compact"),
    (processes.OURS, "torch", "torch sort", "torch by layer"), shapes_of, figures, {"target": TARGET},
)  # fmt: skip

if __name__ == "__main__":
    processes.main(BENCHMARK, 90)
