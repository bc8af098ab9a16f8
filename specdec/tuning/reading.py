"""The time that it takes to go through tensors in memory once: little that computes with all of them can take less."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from specdec.clock import finish, host_seconds


def ways(tensors: Sequence[Tensor]) -> dict[str, Callable[[], list[Tensor]]]:
    """Calls that read every element once. Which is fastest depends on the CPU and the type: finding maxima was seen at half the
    speed of products on one CPU, and at up to twice their speed on another. A floor is the fastest of all.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    rows = [each.view(-1, math.gcd(len(each), 4096)) for each in flat]
    ones = [matrix.new_ones(matrix.shape[1]) for matrix in rows]
    return {
        "maxima": lambda: [each.amax() for each in flat],
        "sums": lambda: [each.sum() for each in flat],
        "matrix times vector": lambda: [matrix @ one for matrix, one in zip(rows, ones, strict=True)],
    }


def least(tensors: Sequence[Tensor], repeats: int = 21) -> dict[str, Any]:
    """Milliseconds of the fastest reading, of so many in each way, and which way that was."""
    times = {}
    for way, run in ways(tensors).items():
        for _ in range(repeats):
            began = host_seconds()
            run()
            finish(tensors[0].device)
            times[way] = min(times.get(way, math.inf), 1e3 * (host_seconds() - began))
    fastest = min(times, key=lambda way: times[way])
    return {"milliseconds": times[fastest], "way": fastest}
