"""How long tree attention should take by arithmetic, from the grid that its plan makes. What it assumes was not measured here.

A measurement that is far from its estimate says which assumption is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

from floors import Shape

from specdec_kernels import plan
from specdec_kernels.backend import Chip
from specdec_kernels.configs import attention_config


class Assumed(NamedTuple):
    """By default of an H200. Rates are reached by all multiprocessors together, when each holds as many programs as it can."""

    flops: float = 425e12  # bf16 products of Triton's kernels, which are seen to reach 400 to 450 of 790 a second
    bytes: float = 0.8 * 4.3e12  # of keys and values
    cached: float = 5.5e12  # bytes of partial results, which stay in the L2 cache
    launch: float = 1.5e-6  # seconds between two kernels of a graph
    overlapped: float = 0.5e-6  # the same, where the second may begin before the first has ended
    begin: float = 2e-6  # until a program's first product, and for its last writes: loads that wait for one another
    merge: float = 1e-6  # the same of a program that merges


ON_H200 = Assumed()


class Estimate(NamedTuple):
    """One call."""

    programs: int  # that have something to do
    waves: int
    busy: float  # `plan.busy`
    seconds: float


def tree_attention(shape: Shape, chip: Chip, capacity: int | None = None, assumed: Assumed = ON_H200) -> Estimate:
    """The sum of what waits for one another: the waves, each as long as its fullest program, and the merge.

    Every tile counts as one of the prefix, and a wave that is not full takes no less time than a full one.

    Args:
        capacity: the bound on the length that the launch knows; by default the length itself.
    """
    rows = shape.nodes * shape.heads // shape.kv_heads
    config = attention_config(chip.arch, shape.head_dim, rows, 2)
    launch = chip.processors, shape.batch * shape.kv_heads, rows
    words = -(-shape.nodes // 32)
    count = plan.splits(plan.grid(config, *launch, capacity or shape.length, words))
    grid = plan.grid(config, *launch, shape.seen - shape.nodes, words)
    tile = 4 * config.block_n * shape.head_dim
    seconds = grid.at_once * max(tile * config.block_m / assumed.flops, tile / assumed.bytes)
    total = assumed.launch + plan.waves(grid, count) * (assumed.begin + plan.share(grid, count) * seconds)
    if count > 1:
        parts = 4 * plan.used(grid, count) * shape.batch * shape.nodes * shape.heads * shape.head_dim
        total += 2 * parts / assumed.cached + (assumed.overlapped if chip.overlaps else assumed.launch) + assumed.merge
    programs = grid.programs * plan.used(grid, count)
    return Estimate(programs, plan.waves(grid, count), plan.busy(grid, count), total)
