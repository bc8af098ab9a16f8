"""Row statistics of the law: the threshold is found by bisection on the order of the logits, which are never sorted.

One program per row, which asks for logits two tiles ahead of its arithmetic. A row of 128k logits stays in the L2 cache from
pass to pass; without filters there are two passes. 16-bit logits take at most 16 passes per filter, and top-p, which looks at
likely tokens only, about 8.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def exponential(b_x, peak, cut, temperature):
    """exp((x - peak) / temperature) where x >= cut; NaN stays NaN."""
    b_e = tl.exp((b_x - peak.to(b_x.dtype)) / temperature)
    return tl.where(b_x < cut.to(b_x.dtype), 0.0, b_e)


@triton.jit
def _load(p_x, start, vocab, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    o_v = start + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_v, mask=o_v < vocab, other=-float("inf"))
    return o_v, b_x.to(tl.float64 if WIDE else tl.float32)


@triton.jit
def _key(b_x, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """int64 that orders as x does, without the SHIFT low bits, which x has none of."""
    if WIDE:
        b_bits = b_x.to(tl.int64, bitcast=True)
        return b_bits ^ ((b_bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        b_bits = b_x.to(tl.int32, bitcast=True)
        return ((b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def _value(key, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """The x whose key this is."""
    if WIDE:
        return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        k = (key << SHIFT).to(tl.int32)
        return (((k ^ ((k >> 31) & 0x7FFFFFFF)) >> SHIFT) << SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def _weight(
    p_x, vocab, key, peak, cut, temperature,
    MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of the tokens up to a key: their exponentials, or their number."""
    b_sum = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, vocab, BLOCK, num_stages=3):
        o_v, b_x = _load(p_x, start, vocab, BLOCK, WIDE)  # [BLOCK]
        b_e = exponential(b_x, peak, cut, temperature).to(tl.float64) if MASS else tl.where(o_v < vocab, 1.0, 0.0)
        b_sum += tl.where(_key(b_x, SHIFT, WIDE) <= key, b_e, 0.0)
    return tl.sum(b_sum)


@triton.jit
def _first_above(
    p_x, vocab, low, high, limit, peak, cut, temperature,
    MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The least key in [low, high] up to which there is a weight above the limit."""
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # half the sum, which might overflow
        if _weight(p_x, vocab, middle, peak, cut, temperature, MASS, SHIFT, BLOCK, WIDE) > limit:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _law_kernel(
    p_logits, p_law, p_best, vocab, temperature, top_k, spared, below, drop,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_x = p_logits + i_row * vocab
    dtype = tl.float64 if WIDE else tl.float32
    b_peak = tl.full([BLOCK], -float("inf"), dtype)
    b_best = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=3):
        o_v, b_x = _load(p_x, start, vocab, BLOCK, WIDE)  # [BLOCK]
        b_best = tl.where(b_x > b_peak, o_v, b_best)
        b_peak = tl.where(b_x > b_peak, b_x, b_peak)
    peak = tl.max(b_peak)
    best = tl.min(tl.where(b_peak == peak, b_best, vocab))
    cut = tl.full((), -float("inf"), dtype)
    top = _key(peak, SHIFT, WIDE)
    if TOP_K:
        low = _key(cut, SHIFT, WIDE)
        key = _first_above(p_x, vocab, low, top, vocab - top_k, peak, cut, temperature, False, SHIFT, BLOCK, WIDE)
        cut = _value(key, SHIFT, WIDE)
    if TOP_P:  # tokens `below` the peak are too unlikely to be the last one kept
        total = _weight(p_x, vocab, top, peak, cut, temperature, True, SHIFT, BLOCK, WIDE)
        low = tl.minimum(_key(peak + below, SHIFT, WIDE), top)
        limit = tl.minimum(total * (1 - 1e-9), total * spared)
        key = _first_above(p_x, vocab, low, top, limit, peak, cut, temperature, True, SHIFT, BLOCK, WIDE)
        cut = tl.maximum(cut, _value(key, SHIFT, WIDE))
    cut = tl.maximum(cut, peak + drop)
    b_total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, vocab, BLOCK, num_stages=3):
        o_v, b_x = _load(p_x, start, vocab, BLOCK, WIDE)  # [BLOCK]
        b_total += exponential(b_x, peak, cut, temperature).to(tl.float64)
    tl.store(p_law + i_row * 3, peak.to(tl.float64))
    tl.store(p_law + i_row * 3 + 1, cut.to(tl.float64))
    tl.store(p_law + i_row * 3 + 2, tl.sum(b_total))
    tl.store(p_best + i_row, best.to(tl.int64))


# Tokens a program of 512 threads looks at, without filters or in float64, and with filters: with 8 to a thread ptxas holds
# those down to 64 registers, so that two programs fit a multiprocessor, and spills; with 16 to a thread it does not.
_BLOCK, _FILTERED = 4096, 8192
_SHIFT = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0, torch.float64: 0}  # bits a float32 copy has too many


def law(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    out = logits.new_empty((rows, 3), dtype=torch.float64), logits.new_empty(rows, dtype=torch.int64)
    temperature, wide = temperature or 1.0, logits.dtype == torch.float64
    spared = 0.0 if top_p is None else 1 - top_p
    below = temperature * math.log(spared / vocab) if spared > 0 else 0.0
    drop = temperature * math.log(min_p) if min_p else -math.inf
    by_count, by_mass = top_k is not None and top_k < vocab, spared > 0
    block = _FILTERED if (by_count or by_mass) and not wide else _BLOCK
    _law_kernel[(rows,)](
        logits.contiguous(), *out, vocab, temperature, top_k or 0, spared, below, drop,
        TOP_K=by_count, TOP_P=by_mass, SHIFT=_SHIFT[logits.dtype],
        BLOCK=min(block, triton.next_power_of_2(vocab)), WIDE=wide, num_warps=16, enable_fp_fusion=True,
    )  # fmt: skip
    return out
