"""Times laws, verification and compaction beside their floors and rivals on a GPU: experiments/gpu.sh runs it after the tests.

python kernels/bench/bench_verify.py --tests outputs/gpu_tests --seconds 90
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import report
import torch
import verification
from floors import Compaction, Laws

ROTATED = 200 << 20  # bytes that calls go through in turn: several times an L2 cache
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


def main() -> None:
    chosen = report.asked(90, "law", "verify", "compact")
    source, began, rows, left, path = report.provenance(), time.monotonic(), [], [], None
    for shape in shapes():
        if time.monotonic() - began <= chosen.seconds:
            rows += time_shape(shape, buffers(shape, "cuda"))
            torch.cuda.empty_cache()
        else:
            left.append(f"{asdict(shape)}: time")
        notes = {**source, "target": TARGET, "left out": left}
        path = report.write(rows, notes, chosen.results, "kernels_{gpu}_{date}_verification")  # now: time may run out
    print(path)
    report.require_ours(rows)


def buffers(shape: Laws | Compaction, device: str) -> list[verification.Arguments]:
    """Arguments of as many calls as go through `ROTATED` bytes, at least 4."""
    calls = max(4, math.ceil(ROTATED / shape.bytes))
    if isinstance(shape, Compaction):
        return verification.compact_inputs(shape, device, 0, calls)
    draw = verification.law_inputs if shape.op == "law" else verification.verify_inputs
    return [draw(shape, device, seed) for seed in range(calls)]


def time_shape(shape: Laws | Compaction, turns: list[verification.Arguments]) -> list[dict[str, Any]]:
    """One row for each candidate; one that is wrong or refuses has a reason in place of figures."""
    rows = []
    for name, call in verification.candidates(shape).items():
        row = {**asdict(shape), "method": name}
        try:
            if fault := verification.fault(shape, call, turns):
                raise RuntimeError(f"wrong: {fault}")
            row |= report.figures(shape, report.measure([lambda turn=turn, call=call: call(*turn) for turn in turns]))
        except Exception as refusal:
            row["reason"] = report.reason(refusal)
        rows.append(row)
        print({k: v for k, v in row.items() if v is not None}, flush=True)
    return rows


if __name__ == "__main__":
    main()
