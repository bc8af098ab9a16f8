"""Times recurrences over trees beside their floors and rivals on a GPU: `make gpu` runs it after the tests.

python kernels/bench/bench_recurrences.py --seconds 60
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import processes
import report
import torch
from floors import Recurrence
from torch import Tensor

import specdec_kernels
from specdec_kernels.reference.gated_delta import gated_delta
from specdec_kernels.reference.linear_attention import fold_linear_attention, linear_attention

Arguments = tuple[Tensor, ...]  # of the op, those of the fold last
IN_TORCH: dict[str, Callable[..., Any]] = {
    "gated_delta": gated_delta,
    "linear_attention": linear_attention,
    "fold_linear_attention": fold_linear_attention,
}
FOLDED = 5  # arguments of a fold
STATE = {"gated_delta": 5, "linear_attention": 4, "fold_linear_attention": 0}  # where it is among the arguments
TOLERANCE = 1e-5  # of a result, norm over norm, against float64: as in the tests
ROTATED = 200 << 20  # bytes that calls go through in turn: several times an L2 cache
DRY = [Recurrence(op, 2, nodes, 2, 4, 2, 8, 16) for op, nodes in zip(IN_TORCH, (5, 5, 0), strict=True)]


def shapes() -> Iterator[Recurrence]:
    """The most telling first: what time does not suffice for is left out and named."""
    for batch in (1, 32):
        for nodes in (16, 1, 64):
            for op in ("gated_delta", "linear_attention"):
                yield Recurrence(op, batch, nodes)
        yield Recurrence("fold_linear_attention", batch, nodes=0)


def shapes_of(method: str, dry: bool) -> list[Recurrence]:
    """Those that this method computes."""
    return [shape for shape in (DRY if dry else shapes()) if method in candidates(shape)]


def inputs(shape: Recurrence, device: str, seed: int) -> Arguments:
    """A tree in which a node's parent is the node with half its number. What is not kept of nodes is in bfloat16."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(nodes: int, *tail: int) -> Tensor:
        return torch.randn(shape.batch, nodes, *tail, generator=generator, device=device)

    def kept(nodes: int) -> list[Tensor]:
        """Keys, values, decays."""
        key = torch.nn.functional.normalize(random(nodes, shape.key_heads, shape.dim), dim=-1)
        return [key, random(nodes, shape.heads, shape.value_dim), -random(nodes, shape.heads).exp() / 10]

    state, room = random(shape.heads, shape.dim, shape.value_dim), 2 * shape.kept
    path = random(room).topk(shape.kept).indices.sort(1).values
    fold = *kept(room), path, torch.full((shape.batch,), shape.kept, device=device)
    if shape.nodes == 0:
        return state, *fold
    ancestors = torch.eye(shape.nodes, dtype=torch.bool, device=device)
    for node in range(1, shape.nodes):
        ancestors[node] |= ancestors[(node - 1) // 2]
    ancestors = ancestors.repeat(shape.batch, 1, 1)
    query, (key, value, decay) = random(shape.nodes, shape.key_heads, shape.dim).bfloat16(), kept(shape.nodes)
    if shape.op == "linear_attention":
        return query, key, value, decay, state, ancestors, *fold
    beta = random(shape.nodes, shape.heads).sigmoid().bfloat16()
    return query, key, value.bfloat16(), decay, beta, state, ancestors, torch.zeros_like(value), *fold


def candidates(shape: Recurrence) -> dict[str, Callable[..., Any]]:
    """What can compute this shape: the op, the op after a fold of its own, and torch."""
    ours, torchs = getattr(specdec_kernels, shape.op), IN_TORCH[shape.op]
    if shape.nodes == 0:
        return {processes.OURS: ours, "torch": torchs}

    def apart(*arguments: Tensor) -> Tensor:
        specdec_kernels.fold_linear_attention(arguments[STATE[shape.op]], *arguments[-FOLDED:])
        return ours(*arguments[:-FOLDED])

    return {
        processes.OURS: lambda *arguments: ours(*arguments[:-FOLDED], arguments[-FOLDED:]),
        "fold apart": apart,
        "torch": lambda *arguments: torchs(*arguments[:-FOLDED], arguments[-FOLDED:]),
    }


def fault(shape: Recurrence, call: Callable[..., Any], arguments: Arguments) -> str | None:
    """What is wrong with what a call returns, or with the states that it leaves, if anything is. It changes arguments."""
    exact = [x.double() if x.is_floating_point() else x.clone() for x in arguments]
    out, due = call(*arguments), candidates(shape)["torch"](*exact)
    state = STATE[shape.op]
    for name, x, y in (("result", out, due), ("state", arguments[state], exact[state])):
        if x is not None and not (off := float((x.double() - y).norm() / y.norm())) < TOLERANCE:
            return f"{name} off by {off:.1e}, rounding by at most {TOLERANCE:.0e}"
    return None


def figures(shape: Recurrence, method: str, device: str) -> dict[str, Any]:
    """Of calls that go through several inputs in turn; raises if a result is wrong or refused."""
    call = candidates(shape)[method]
    calls = max(4, math.ceil(ROTATED / shape.bytes)) if device == "cuda" else 4
    if wrong := fault(shape, call, inputs(shape, device, 0)):
        raise RuntimeError(f"wrong: {wrong}")
    turns = [inputs(shape, device, seed) for seed in range(calls)]
    return report.figures(shape, report.measure([lambda turn=turn: call(*turn) for turn in turns], device))


BENCHMARK = processes.Benchmark(
    __file__, "kernels_{gpu}_{date}_recurrences", ("recurrences",), (processes.OURS, "fold apart", "torch"), shapes_of,
    figures, {},
)  # fmt: skip

if __name__ == "__main__":
    processes.main(BENCHMARK, 60)
