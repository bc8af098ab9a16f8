"""Times an LM head over 128k tokens, the laws and the verification of its logits, beside the reading of its weights.

    python kernels/bench/bench_head.py

Of a step of a large model this is what grows with the vocabulary, and a benchmark of whole steps whose models have few tokens
leaves it out (`bench_engine.py`). Weights are random: times do not depend on them.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
import verification
from floors import Laws

import specdec_kernels

NODES = (1, 16, 64)
SAMPLINGS = ("greedy", "temperature", "top-p")
CALLS = 8  # in one graph


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--seconds", type=float, default=60, help="begin no shape after so long")
    options.add_argument("--dry-run", action="store_true", help="on the CPU, small")
    options.add_argument("--hidden", type=int, default=4096)
    options.add_argument("--vocab", type=int, default=Laws.vocab)
    options.add_argument("--results", type=Path, default=report.ROOT / "experiments/results")
    chosen = options.parse_args()
    device, end = "cpu" if chosen.dry_run else "cuda", time.monotonic() + chosen.seconds
    hidden, vocab = (32, 300) if chosen.dry_run else (chosen.hidden, chosen.vocab)
    rate = report.bandwidth(device)
    weight = torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16)
    shapes = [Laws("verify", sampling, "POINT", 1, nodes, vocab) for sampling in SAMPLINGS for nodes in NODES]
    rows = []
    notes = {**report.provenance(), "copy bandwidth, bytes/s": rate, "hidden": hidden, "vocab": vocab}
    for shape in shapes:
        if time.monotonic() > end:
            rows.append({"sampling": shape.sampling, "nodes": shape.nodes, "reason": "left out for want of time"})
        else:
            rows.append(figures(shape, weight, rate))
        path = report.write(rows, notes, chosen.results, "head_{gpu}_{date}")  # now: the next may fail
    print(path)


def figures(shape: Laws, weight: torch.Tensor, rate: float) -> dict[str, Any]:
    """Microseconds of the parts and of head and verification together; a wrong verification has a reason in their place.

    `law` is of all nodes, which rules other than sibling rejection ask for; `verify` has the laws of those that it visits.
    """
    device, row = weight.device.type, {"sampling": shape.sampling, "nodes": shape.nodes}
    logits, *drafted = verification.verify_inputs(shape, device, seed=0)
    if fault := verification.fault(shape, specdec_kernels.verify, [(logits, *drafted)]):
        return {**row, "reason": fault}
    hidden = torch.randn(shape.nodes, weight.shape[1], device=device, dtype=weight.dtype)
    parts: dict[str, Callable[[], object]] = {
        "head": lambda: torch.nn.functional.linear(hidden, weight),
        "law": lambda: specdec_kernels.law(logits[0], *verification.SAMPLINGS[shape.sampling]),
        "verify": lambda: specdec_kernels.verify(logits, *drafted),
    }
    parts["together"] = lambda: (parts["head"](), parts["verify"]())  # of logits for which drafts are accepted
    try:
        timings = {name: report.measure([call] * CALLS, device) for name, call in parts.items()}
    except Exception as error:
        traceback.print_exc()
        return {**row, "reason": report.reason(error)}
    floor = weight.numel() * weight.element_size() / rate
    found = {
        **row,
        **{f"{name} us": 1e6 * timing.seconds for name, timing in timings.items()},
        "spread %": 100 * timings["together"].spread,
        "weight floor us": 1e6 * floor,
        "head, % of floor": 100 * floor / timings["head"].seconds,
        "together, % of floor": 100 * floor / timings["together"].seconds,
        **timings["together"].load,
    }
    print({k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    return found


if __name__ == "__main__":
    main()
