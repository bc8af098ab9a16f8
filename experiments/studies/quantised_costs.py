"""What passes cost on a roofline of a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from specdec.theory.costs import CostCurve, Costs, predicted_speed_up
from specdec.theory.shapes import chain_speed_ups

LONG = 512  # tokens of the prompts after which windows are measured: a window over a whole text leaves nothing out

# NVIDIA H200 SXM, data sheet: bytes per second of memory, operations per second without sparsity
BANDWIDTH, BF16, INT8 = 4.8e12, 989e12, 1979e12
# Llama-3.1-8B: weights that a pass reads (all but the input embedding), and keys and values of a token, in numbers
WEIGHTS, CACHE, ATTENTION = 7.5e9, 2 * 32 * 8 * 128, 4 * 32 * 32 * 128
SMALL_WEIGHTS, SMALL_CACHE = 1.24e9, 2 * 16 * 8 * 64  # Llama-3.2-1B
CONTEXT, BATCHES = 32768, (1, 8, 24)
BYTES = {  # of a weight, with 16 bits for every scale and smallest value
    "bf16": 2.0,
    "int8, a scale per row": 1.0,
    "int4, groups of 32": 0.5 + 2 / 32,
    "int4, groups of 64": 0.5 + 2 / 64,
    "int4, a scale per row": 0.5,
    "int3, groups of 64": 0.375 + 2 / 64,
}
TARGETS = {  # bytes of a weight, and of a number in the cache
    "bf16": (2.0, 2.0),
    "int8": (1.0, 2.0),
    "int8, int8 cache": (1.0, 1.0),
    "int4, int8 cache": (BYTES["int4, groups of 32"], 1.0),
}
# drafts that are not the target, with a rate that is assumed
SMALL, SMALL_RATE = "a model of 1.2 billion weights", 0.7
TEXT, TEXT_LENGTH, TEXT_NODES = "tokens from the text itself, 8", 2.0, 9


class Pass(NamedTuple):
    """A forward pass on the roofline: as long as reading takes, or computing, whichever is longer.

    Args:
        weights: bytes that are read once.
        cache: bytes that are read for each text.
        integers: whether products are of 8-bit integers.
        size: weights, in numbers.
        attention: operations of attention for each new token.
    """

    weights: float
    cache: float
    integers: bool = False
    size: float = WEIGHTS
    attention: float = ATTENTION * CONTEXT

    def seconds(self, tokens: int, batch: int) -> float:
        reading = (self.weights + batch * self.cache) / BANDWIDTH
        products = 2 * self.size / (INT8 if self.integers else BF16)
        return max(reading, tokens * batch * (products + self.attention / BF16))

    def curve(self, batch: int, most: int = 9) -> CostCurve:
        """The same by tokens of a text."""
        nodes = tuple(range(1, most + 1))
        return CostCurve(nodes, tuple(self.seconds(n, batch) for n in nodes))


def roofline(drafts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each draft, target format and batch: the best speed-up over that target alone, and the chain that gives it.

    The row of the target itself is its speed over the bf16 target.
    """
    plain = Pass(2 * WEIGHTS, 2 * CACHE * CONTEXT)
    found: dict[str, dict[str, Any]] = {}
    for name, (weight, number) in TARGETS.items():
        target = Pass(weight * WEIGHTS, number * CACHE * CONTEXT, weight == 1.0)
        for batch in BATCHES:
            column = f"{name}, batch {batch}"
            alone = [plain.seconds(1, batch) / target.seconds(1, batch), 0]
            found.setdefault("the target", {})[column] = alone
            for draft, best in _gains(drafts, target, weight, number, batch).items():
                found.setdefault(draft, {})[column] = best
    return found


def _gains(
    drafts: dict[str, Any], target: Pass, weight: float, number: float, batch: int
) -> dict[str, list[float] | None]:
    found: dict[str, list[float] | None] = {}
    for name, row in drafts.items():
        if name in BYTES:
            own = Pass(BYTES[name] * WEIGHTS, target.cache) if BYTES[name] < weight else None
        elif name.startswith("window"):
            own = Pass(target.weights, number * CACHE * _keys(name), target.integers, attention=ATTENTION * _keys(name))
        else:
            continue
        found[name] = _best(row["T = 0.7"]["lengths"], target, own, batch) if own else None
    rates = {name: row["T = 0.7"]["acceptance"] for name, row in drafts.items() if "T = 0.7" in row}
    bits, window = "int4, groups of 32", "window of 4 + 256 keys"
    if {bits, window} <= rates.keys() and BYTES[bits] < weight:
        both = Pass(BYTES[bits] * WEIGHTS, number * CACHE * _keys(window), attention=ATTENTION * _keys(window))
        found[f"{bits}, and {window}"] = _geometric(rates[bits] * rates[window], target, both, batch)
    small = Pass(2 * SMALL_WEIGHTS, 2 * SMALL_CACHE * CONTEXT, size=SMALL_WEIGHTS, attention=0)
    found[SMALL] = _geometric(SMALL_RATE, target, small, batch)
    free = Costs(target.curve(batch, TEXT_NODES))
    chain = list(range(-1, TEXT_NODES - 1))
    found[TEXT] = [predicted_speed_up(TEXT_LENGTH, chain, free), TEXT_NODES - 1]
    return found


def _best(lengths: dict[int, float], target: Pass, own: Pass, batch: int) -> list[float]:
    costs = Costs(target.curve(batch), own.curve(batch))
    gains = {depth: predicted_speed_up(length, list(range(-1, depth)), costs) for depth, length in lengths.items()}
    depth = max(gains, key=lambda d: gains[d])
    return [gains[depth], depth]


def _geometric(rate: float, target: Pass, own: Pass, batch: int) -> list[float]:
    gains = chain_speed_ups([rate] * 8, Costs(target.curve(batch), own.curve(batch)))[1:]
    return [max(gains), 1 + int(np.argmax(gains))]


def _keys(name: str) -> int:
    """The keys of a window, from its name."""
    sinks, window = (int(word) for word in name.split() if word.isdigit())
    return sinks + window
