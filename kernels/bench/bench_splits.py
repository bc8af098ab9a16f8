"""Times one layer's tree attention of 64 nodes by the number of splits: the choice that short batches stand or fall with.

python kernels/bench/bench_splits.py --seconds 90
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bench_tree_attention as attention
import processes
import torch
from floors import Shape

from specdec_kernels import tree_attention

LENGTHS = (8192, 32768, 1024)
SPLITS = (None, 8, 4, 16, 1, 2, 3, 5, 6, 9, 12, 24, 32)  # None: what the launcher chooses


@dataclass(frozen=True)
class Split(Shape):
    """A shape, and into how many parts its slots are split."""

    splits: int | None = None


def shapes_of(method: str, dry: bool) -> list[Split]:
    if dry:
        return [Split("dry", 4, 2, 16, 5, 140, 1, splits=splits) for splits in (None, 2)]
    return [Split(*attention.LLAMA3, 64, length, 1, splits=splits) for length in LENGTHS for splits in SPLITS]


def figures(shape: Split, method: str, device: str) -> dict[str, Any]:
    """As those of tree attention."""

    def call(arguments: dict[str, Any]) -> torch.Tensor:
        if shape.splits is None or device != "cuda":
            return tree_attention(**arguments)[0]
        from specdec_kernels.triton.tree_attention import tree_attention as launch

        return launch(**{"scale": None, "sinks": None, **arguments}, splits=shape.splits)[0]

    return attention.checked_figures(shape, call, attention.buffers(shape, device), device)


BENCHMARK = processes.Benchmark(
    __file__, "kernels_{gpu}_{date}_splits", ("tree_attention",), (processes.OURS,), shapes_of, figures, {}
)

if __name__ == "__main__":
    processes.main(BENCHMARK, 90)
