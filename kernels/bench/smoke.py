"""Each op once, in order of risk: launched, checked in float64, captured, replayed on other inputs, checked again, timed.

python kernels/bench/smoke.py --seconds 120

Every op has a process of its own (see `processes`), so that the first failure is not the last result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import bench_recurrences as recurrences
import bench_stored_linear as stored
import bench_tree_attention as attention
import bench_verify
import processes
import report
import torch
import verification
from floors import Compaction, Laws, Product, Recurrence, Shape, Work

import specdec_kernels
from specdec.clock import finish
from specdec_kernels import tree_attention

# by op, the riskiest first: descriptors of the copy engine and splits that merge in a launch that begins early, then 128 rows
# of warp groups; drawn laws, filters
OPS: dict[str, list[Work]] = {
    "tree_attention": [
        Shape(*attention.LLAMA3, 16, 1024, 1), Shape(*attention.LLAMA3, 64, 8192, 1), Shape(*attention.LLAMA3, 4, 1, 2),
        Shape(*attention.GEMMA2, 64, 8192, 1, softcap=50.0, window=4096),
    ],
    "verify": [Laws("verify", "temperature", "SAMPLED_THEN_TOP", 2), Laws("verify", "top-p", "POINT", 1)],
    "law": [Laws("law", "top-p", "", 1), Laws("law", "top-k", "", 1), Laws("law", "greedy", "", 1)],
    "compact": [Compaction("compact", 2)],
    "gated_delta": [Recurrence("gated_delta", 2), Recurrence("gated_delta", 2, nodes=64, kept=20)],
    "linear_attention": [Recurrence("linear_attention", 2), Recurrence("linear_attention", 2, nodes=64, kept=20)],
    "fold_linear_attention": [Recurrence("fold_linear_attention", 2, nodes=0)],
    "linear_int4": [Product("linear_int4", 64), Product("linear_int4", 1)],
    "linear_int8": [Product("linear_int8", 64), Product("linear_int8", 1)],
}  # fmt: skip


def shapes_of(method: str, dry: bool) -> Sequence[Work]:
    if not dry:
        return OPS[method]
    if method == "tree_attention":
        return attention.DRY
    return [s for s in (*bench_verify.DRY, *recurrences.DRY, *stored.DRY) if s.op == method]


def figures(shape: Work, method: str, device: str) -> dict[str, Any]:
    """Seconds of the first call (compilation), microseconds of a replay; raises with the stage that went wrong."""
    call, check, (first, second) = prepared(shape, device)
    began = time.perf_counter()
    call(*_copy(first))
    finish(torch.device(device))
    first_call = time.perf_counter() - began
    _require("launched", check(call, first))
    static = _copy(first)
    replay = report.captured(lambda: call(*static), device)

    def replayed(*arguments: Any) -> Any:
        _write(static, arguments)
        found = replay()
        _write(arguments, static)  # of what is changed in place
        return found

    _require("replayed", check(replayed, second))
    timing = report.measure([lambda: call(*static)], device)
    return {"first call s": first_call, "captured": device == "cuda", **report.figures(shape, timing)}


def prepared(shape: Work, device: str) -> tuple[Callable[..., Any], Callable, list[tuple[Any, ...]]]:
    """The call, what finds a fault in it on arguments, and two sets of those."""
    if isinstance(shape, Recurrence):
        turns = [recurrences.inputs(shape, device, seed) for seed in range(2)]
        return recurrences.candidates(shape)[processes.OURS], partial(recurrences.fault, shape), turns
    if isinstance(shape, Product):
        turns = [stored.inputs(shape, device, seed) for seed in range(2)]
        return getattr(specdec_kernels, shape.op), partial(stored.fault, shape), turns
    if not isinstance(shape, Shape):

        def check(call: Callable[..., Any], arguments: tuple[Any, ...]) -> str | None:
            return verification.fault(shape, call, [arguments])

        if isinstance(shape, Compaction):  # on equal slots: a graph's inputs must not be one memory
            turns = [verification.compact_inputs(shape, device, seed)[0] for seed in range(2)]
        else:
            draw = verification.law_inputs if shape.op == "law" else verification.verify_inputs
            turns = [draw(shape, device, seed) for seed in range(2)]
        return verification.candidates(shape)[processes.OURS], check, turns
    made = [attention.inputs(shape, device, seed) for seed in range(2)]
    names = [*made[0]]

    def call(*values: Any) -> torch.Tensor:
        return tree_attention(**dict(zip(names, values, strict=True)))[0]

    def off(call: Callable[..., Any], values: tuple[Any, ...]) -> str | None:
        arguments = dict(zip(names, values, strict=True))
        found = attention.error(lambda a: call(*a.values()), arguments)
        return None if found < attention.TOLERANCE else f"error {found:.1e}"

    return call, off, [tuple(arguments.values()) for arguments in made]


def _require(stage: str, fault: str | None) -> None:
    if fault:
        raise RuntimeError(f"wrong when {stage}: {fault}")


def _copy(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """In memory of its own, of the same strides."""
    return tuple(x.clone() if torch.is_tensor(x) else x for x in arguments)


def _write(to: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
    for goal, source in zip(to, arguments, strict=True):
        if torch.is_tensor(goal):
            goal.copy_(source)


BENCHMARK = processes.Benchmark(__file__, "smoke_{gpu}_{date}", tuple(OPS), tuple(OPS), shapes_of, figures, {})

if __name__ == "__main__":
    processes.main(BENCHMARK, 120)
