"""How tree attention is split so that its programs fill a chip: arithmetic on numbers that the host knows.

A program owns a block of the rows that share a KV head, and one of several even shares of the tiles of slots that they see.
Lengths are on the device: a plan takes the bound on them that a launch, or a graph that is replayed, was made with. Shared out
are the tiles that are there, so that under shorter texts the first splits do all the work, and the others leave at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from specdec_kernels.configs import Config

MOST = 128  # splits
# What costs as much as so many tiles. A program begins with an empty pipeline and ends by writing its result; partial results
# are merged by a launch of its own.
BEGIN, MERGE = 1, 2
SLACK = 1.05  # fewer splits are taken if they cost no more than so many times the least: less is written and merged


class Grid(NamedTuple):
    """A launch before it is split."""

    programs: int  # row blocks x batch x KV heads
    tiles: int  # at most, of each program
    at_once: int  # programs that the chip holds at once


def grid(config: Config, processors: int, heads: int, rows: int, prefix: int, words: int) -> Grid:
    """Of one launch.

    Args:
        processors: multiprocessors of the chip.
        heads: KV heads of all texts together.
        rows: that share a KV head.
        prefix: slots before the tree, at most.
        words: of 32 nodes each.
    """
    return Grid(-(-rows // config.block_m) * heads, -(-prefix // config.block_n) + words, processors * config.resident)


@lru_cache(maxsize=4096)
def splits(grid: Grid) -> int:
    """The fewest splits that take about the least time.

    FlashAttention-3 takes the fewest that keep a chip within 85 % of as busy as any number does; here it costs time to begin
    and to merge, too, so that few tiles are not split for nothing.
    """
    costs = {count: cost(grid, count) for count in range(1, min(grid.tiles, MOST) + 1)}
    return next(count for count, found in costs.items() if found <= SLACK * min(costs.values()))


def cost(grid: Grid, count: int) -> int:
    """The time that `count` splits take, in tiles."""
    return waves(grid, count) * (share(grid, count) + BEGIN) + MERGE * (count > 1)


def busy(grid: Grid, count: int) -> float:
    """Wave efficiency: which part of the chip goes through tiles, on average over the waves; 1 at best."""
    return grid.programs * grid.tiles / (grid.at_once * waves(grid, count) * share(grid, count))


def waves(grid: Grid, count: int) -> int:
    """How many times the chip is filled with programs that have something to do."""
    return -(-grid.programs * used(grid, count) // grid.at_once)


def sizes(grid: Grid, count: int) -> list[int]:
    """How many programs with something to do each wave has."""
    full, left = divmod(grid.programs * used(grid, count), grid.at_once)
    return [grid.at_once] * full + [left] * (left > 0)


def used(grid: Grid, count: int) -> int:
    """How many of the splits have something to do."""
    return -(-grid.tiles // share(grid, count))


def share(grid: Grid, count: int) -> int:
    """Tiles of a program."""
    return -(-grid.tiles // count)


class Multiprocessor(NamedTuple):
    """What the programs on one multiprocessor (AMD's compute unit) share."""

    registers: int  # of 32 bits, in each of its four parts
    shared: int  # bytes
    reserved: int  # bytes of those that each program takes besides its own
    threads: int  # of a warp


# sm_80 is that of an A100; consumer chips have 100 KB of shared memory
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(16384, 164 << 10, 1 << 10, 32),
    "sm_90": Multiprocessor(16384, 228 << 10, 1 << 10, 32),
    "sm_100": Multiprocessor(16384, 228 << 10, 1 << 10, 32),
    "gfx942": Multiprocessor(32768, 64 << 10, 0, 64),
}
PARTS, PART_WARPS, UNIT = (
    4,
    16,
    8,
)  # of a multiprocessor; the most of a part; registers are given to threads in such units


def resident(arch: str, registers: int, shared: int, warps: int) -> int:
    """Programs of a compiled kernel that one multiprocessor holds at once.

    Args:
        registers: of a thread.
        shared: bytes of a program.
        warps: of a program.
    """
    has = MULTIPROCESSORS[arch]
    warp = has.threads * -(-registers // UNIT) * UNIT
    by_registers = PARTS * min(has.registers // warp, PART_WARPS) // warps
    return min(by_registers, has.shared // max(shared + has.reserved, 1))
