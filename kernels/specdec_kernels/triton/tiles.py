"""Row statistics of the law, by tiles of the vocabulary: each tile has a program, so that a few rows fill a GPU.

The first launch reads every tile once: its peak, the first token there, and its weights added up in units of that peak. What
needs a row's numbers merges those of its tiles, always in the same order. Filters take a second launch (`filters`); for top-p
the first one also counts tokens by their weight.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192  # tokens that 256 threads hold in registers
_LINE = 64  # 128 bytes of 16-bit logits
_COLDEST = 1e-30  # temperature, whose inverse is a float32
FINE = tl.constexpr(2)  # bins of tokens to a power of two
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def rate(temperature, WIDE: tl.constexpr):
    """What differences of logits are multiplied by to be exponents of 2."""
    if WIDE:
        return tl.full((), LOG2_E, tl.float64) / tl.full((), temperature, tl.float64)
    else:
        return tl.div_rn(tl.full((), LOG2_E, tl.float32), tl.full((), temperature, tl.float32))


@triton.jit
def exponential(b_x, peak, cut, rate):
    """exp((x - peak) / temperature) where x >= cut; NaN stays NaN."""
    b_e = tl.exp2((b_x - peak.to(b_x.dtype)) * rate.to(b_x.dtype))
    return tl.where(b_x < cut.to(b_x.dtype), 0.0, b_e)


@triton.jit
def summed(b_x, BLOCK: tl.constexpr):
    """The sum in float64, to which not every number but every four, which one thread holds, are converted."""
    return tl.sum(tl.sum(tl.reshape(b_x, [BLOCK // 4, 4]), 1).to(tl.float64))


@triton.jit
def tokens_of(i_tile, tiles, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """[BLOCK] tokens of a tile: every so many lines one, as the likely tokens of a vocabulary often stand together."""
    o = tl.arange(0, BLOCK)
    return (o // LINE * tiles + i_tile) * LINE + o % LINE


@triton.jit
def read_tile(p_logits, i_row, i_tile, vocab, tiles, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """Tokens [BLOCK] int32 of a tile, and their logits as they are stored, -inf past the vocabulary."""
    o_v = tokens_of(i_tile, tiles, BLOCK, LINE)
    return o_v, tl.load(p_logits + i_row * vocab + o_v, mask=o_v < vocab, other=-float("inf"))


@triton.jit
def tile_numbers(
    p_logits, p_part, p_first, p_arrived, p_bins, i_row, i_tile, vocab, tiles, temperature,
    GREEDY: tl.constexpr, WIDE: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Store (peak, cut, total) of a tile, and the first token at the peak. A NaN stands for a logit of +inf: neither is a law.

    If there are BINS: bin j counts the tokens of weights from 2^(-j / FINE) down to 2^(-(j + 1) / FINE), the last one also all
    that are lighter.
    And the count of programs that arrive in the next launch is 0.
    """
    o_v, b_x = read_tile(p_logits, i_row, i_tile, vocab, tiles, BLOCK, LINE)
    b_x = b_x.to(tl.float64 if WIDE else tl.float32)
    b_x = tl.where(b_x == b_x, b_x, float("inf"))
    peak = tl.max(b_x)
    cut, total = peak.to(tl.float64), tl.full((), 1.0, tl.float64)
    if not GREEDY:
        cut = tl.full((), -float("inf"), tl.float64)
        base = tl.where(peak > cut, peak, 0.0)  # where there is no logit but -inf, weights are 0
        b_power = (b_x - base) * rate(temperature, WIDE)
        total = summed(tl.exp2(b_power), BLOCK)
        if BINS:
            b_bin = tl.where(-b_power * FINE < BINS - 1, -b_power * FINE, BINS - 1).to(tl.int32)
            o_b = tl.arange(0, BINS)
            tl.store(p_bins + (i_row * tiles + i_tile) * BINS + o_b, tl.histogram(b_bin, BINS))
    at = i_row * tiles + i_tile
    tl.store(p_part + at * 3, peak.to(tl.float64))
    tl.store(p_part + at * 3 + 1, cut)
    tl.store(p_part + at * 3 + 2, total)
    tl.store(p_first + at, tl.min(tl.where(b_x == peak, o_v, vocab)).to(tl.int64))
    tl.store(p_arrived + i_row, 0, mask=i_tile == 0)


@triton.jit
def merged(p_part, p_first, i_row, parts, temperature, GREEDY: tl.constexpr, PARTS: tl.constexpr):
    """Of a row whose numbers are known by parts: peak, cut and total (float64), and the first token at the peak (int64)."""
    o = tl.arange(0, PARTS)
    at, mask = i_row * parts + o, o < parts
    b_peak = tl.load(p_part + at * 3, mask=mask, other=-float("inf"))
    b_first = tl.load(p_first + at, mask=mask, other=0)
    peak, cut = tl.max(b_peak), tl.max(tl.load(p_part + at * 3 + 1, mask=mask, other=-float("inf")))
    total = tl.full((), 1.0, tl.float64)
    if not GREEDY:
        b_total = tl.load(p_part + at * 3 + 2, mask=mask, other=0.0)
        total = tl.sum(b_total * tl.exp2((b_peak - peak) * rate(temperature, True)))
    total = tl.where(tl.abs(peak) < float("inf"), total, float("nan"))
    return peak, cut, total, tl.min(tl.where(mask & (b_peak == peak), b_first, 9223372036854775807))


class Numbers(NamedTuple):
    """Of rows of logits, what launches leave for those after them; the memory is the caller's."""

    part: Tensor  # [row, part, 3] float64: peak, cut and total of a part of the vocabulary
    first: Tensor  # [row, part] int64: the first token at the peak
    arrived: Tensor  # [row] int32: programs that are done, 0 between launches
    bins: Tensor  # [row, part, bin] int32: tokens of each, if they are counted

    @property
    def flags(self) -> dict[str, int]:
        return dict(PARTS=triton.next_power_of_2(self.part.shape[1]))


class Tiles(NamedTuple):
    """How the vocabulary is shared out: by its size alone, so that sums are the same on every device and in every batch."""

    block: int
    line: int
    count: int

    @classmethod
    def of(cls, logits: Tensor) -> Tiles:
        vocab = logits.shape[-1]
        block = min(_TILE // 4 if logits.dtype == torch.float64 else _TILE, max(triton.next_power_of_2(vocab), 16))
        return cls(block, min(_LINE, block), triton.cdiv(vocab, block))

    @property
    def flags(self) -> dict[str, int]:
        return dict(BLOCK=self.block, LINE=self.line, num_warps=8, enable_fp_fusion=True)

    def numbers(self, logits: Tensor, rows: int, bins: int) -> Numbers:
        """Memory for those of the tiles."""
        return Numbers(
            logits.new_empty((rows, self.count, 3), dtype=torch.float64),
            logits.new_empty((rows, self.count), dtype=torch.int64),
            logits.new_empty(rows, dtype=torch.int32),
            logits.new_empty((rows, self.count, bins), dtype=torch.int32),
        )


def warmth(temperature: float) -> float:
    """The temperature that weights have: at 0 none are computed."""
    return max(temperature or 1.0, _COLDEST)
