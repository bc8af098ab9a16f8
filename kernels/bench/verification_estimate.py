"""How long laws, verification and a token should take by arithmetic: instructions that are counted, times tokens and passes.

The counts are those of `budgets.json`, of a thread by token that it holds, loops once; passes of a bisection are added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from specdec_kernels.backend import Chip

_BUDGETS = json.loads((Path(__file__).resolve().parents[1] / "budgets.json").read_text("utf-8"))["kernels"]
NODES, VOCAB, INTERNAL = 64, 128256, 16
TILE, BLOCK, WARP = 8192, 4096, 32  # tokens of a program of laws and filters, and of one of children
PASSES = 9  # of a bisection of logits in bfloat16, as counted
TILES, LANES = -(-VOCAB // TILE), 2048  # tokens of all tiles that a step of a pass takes


class Assumed(NamedTuple):
    """By default of an H200."""

    issued: float = 0.7 * 4 * 1.755e9  # instructions of warps a second, by one multiprocessor
    counted: float = 8 / 1.755e9  # seconds in which one counts 32 tokens, which belong to about 8 powers of two
    bytes: float = 0.8 * 4.3e12  # of logits and draft weights, a second
    launch: float = 1.5e-6  # seconds between two kernels of a graph
    begin: float = 2e-6  # of a program: loads that wait for one another, and its last writes
    waited: float = 0.5e-6  # from asking for LANES tokens until they are summed, with nothing meanwhile


class Kind(NamedTuple):
    """What is verified."""

    name: str
    laws: str  # the kernel of the first launch, as its budget is called
    filter: str | None = None
    drawn: int = 0  # children of each inner node
    collected: int = 0  # tokens of the fullest tile, which a program bisects among, those of all tiles side by side
    goal: int | None = None  # microseconds


KINDS = (
    Kind("greedy", "law greedy _tile_kernel", goal=60),
    Kind("temperature", "law filtered _tile_kernel", goal=60),
    Kind("4 drawn children", "verify _begin_kernel", drawn=4, goal=60),
    *(
        Kind(f"top-p, {found}", "law top-p _tile_kernel", "law top-p _filter_kernel", collected=tokens, goal=120)
        for found, tokens in (("80 groups collected", 4 * 80), ("512, all room", 4 * 512), ("no room", VOCAB // TILES))
    ),
)


def parts(kind: Kind, chip: Chip, assumed: Assumed | None = None) -> dict[str, float]:
    """Seconds of what waits for one another, of logits in bfloat16, in a graph."""
    assumed = assumed or Assumed()
    alone = assumed.launch + assumed.begin
    logits, weights = 2 * NODES * VOCAB, 4 * INTERNAL * VOCAB * (kind.drawn > 0)
    laws = alone + _over(kind.laws, NODES, TILE, logits + weights, chip, assumed)
    cut = 0.0
    if kind.filter:
        laws += -(-_programs(NODES, TILE) // chip.processors) * TILE / WARP * assumed.counted
        bisection = PASSES * -(-kind.collected * TILES // LANES) * assumed.waited
        cut = alone + _over(kind.filter, NODES, TILE, logits, chip, assumed) + bisection
    children = alone
    if kind.drawn:
        read = (2 + 4) * INTERNAL * VOCAB
        children = kind.drawn * (alone + _over("verify _reject_kernel", INTERNAL, BLOCK, read, chip, assumed))
    # the program that ends last draws from one block more
    return {"laws": laws, "filter": cut, "children": children, "token": alone + assumed.begin}


def _programs(rows: int, block: int) -> int:
    return rows * -(-VOCAB // block)


def _over(kernel: str, rows: int, block: int, read: int, chip: Chip, assumed: Assumed) -> float:
    """Seconds in which the multiprocessor that has most programs issues their instructions, or all are read."""
    count = _BUDGETS[f"{chip.arch} {kernel}"]["per_token"] * block / WARP
    return max(-(-_programs(rows, block) // chip.processors) * count / assumed.issued, read / assumed.bytes)


def table(chip: Chip) -> str:
    """What `kernels/README.md` says of them."""
    found = {kind: parts(kind, chip) for kind in KINDS}
    names = list(found[KINDS[0]])
    lines = [f"| {' | '.join(['us', *names, 'together', 'goal'])} |", "|---" * (len(names) + 3) + "|"]
    for kind, seconds in found.items():
        cells = [*(f"{1e6 * seconds[name]:.0f}" for name in names), f"{1e6 * sum(seconds.values()):.0f}"]
        lines.append(f"| {' | '.join([kind.name, *cells, str(kind.goal or '')])} |")
    return "\n".join(lines)
