"""Times an LM head over 128k tokens, the laws and the verification of its logits, beside the reading of its weights.

    python kernels/bench/bench_head.py

Of a step of a large model this is what grows with the vocabulary, and a benchmark of whole steps whose models have few tokens
leaves it out (`bench_engine.py`). Weights are random: times do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import processes
import report
import torch
import verification
from floors import Laws

import specdec_kernels

NODES = (1, 16, 64)
SAMPLINGS = ("greedy", "temperature", "top-p")
HIDDEN = {"cuda": 4096, "cpu": 32}
CALLS = 8  # in one graph


def shapes_of(method: str, dry: bool) -> list[Laws]:
    """By sampling and number of nodes, the most telling first."""
    vocab = 300 if dry else Laws.vocab
    return [Laws("verify", sampling, "POINT", 1, nodes, vocab) for sampling in SAMPLINGS for nodes in NODES]


@cache
def head(device: str, vocab: int) -> tuple[torch.Tensor, float]:
    """Random weights [vocab, hidden] of a head, and the device's bandwidth in bytes per second."""
    return torch.randn(vocab, HIDDEN[device], device=device, dtype=torch.bfloat16), report.bandwidth(device)


def figures(shape: Laws, method: str, device: str) -> dict[str, Any]:
    """Microseconds of the parts and of head and verification together; raises if the verification is wrong.

    `law` is of all nodes, which rules other than sibling rejection ask for; `verify` has the laws of those that it visits.
    """
    weight, rate = head(device, shape.vocab)
    logits, *drafted = verification.verify_inputs(shape, device, seed=0)
    if fault := verification.fault(shape, specdec_kernels.verify, [(logits, *drafted)]):
        raise RuntimeError(f"wrong: {fault}")
    hidden = torch.randn(shape.nodes, weight.shape[1], device=device, dtype=weight.dtype)
    parts: dict[str, Callable[[], object]] = {
        "head": lambda: torch.nn.functional.linear(hidden, weight),
        "law": lambda: specdec_kernels.law(logits[0], *verification.SAMPLINGS[shape.sampling]),
        "verify": lambda: specdec_kernels.verify(logits, *drafted),
    }
    parts["together"] = lambda: (parts["head"](), parts["verify"]())  # of logits for which drafts are accepted
    timings = {name: report.measure([call] * CALLS, device) for name, call in parts.items()}
    floor = weight.numel() * weight.element_size() / rate
    return {
        "hidden": weight.shape[1],
        **{f"{name} us": 1e6 * timing.seconds for name, timing in timings.items()},
        "spread %": 100 * timings["together"].spread,
        "weight floor us": 1e6 * floor,
        "head, % of floor": 100 * floor / timings["head"].seconds,
        "together, % of floor": 100 * floor / timings["together"].seconds,
        **timings["together"].load,
    }


BENCHMARK = processes.Benchmark(
    __file__, "head_{gpu}_{date}", ("law", "verify"), (processes.OURS,), shapes_of, figures, {}
)

if __name__ == "__main__":
    processes.main(BENCHMARK, 60)
