"""Top-k, top-p and min-p as one threshold on the logits of a row, found by bisection among few of them.

A program for each tile of the vocabulary collects the tokens that may be at the threshold: those above a floor that is known
to lie below it. Under top-p, tokens below the floor weigh less together than may be left out, by how many of them there are
of about each weight. The program that ends a row last bisects among what was collected, on the order of the logits,
which are never sorted. What it finds depends neither on which program that is nor on how many there are: a tile's tokens have
a place of their own. Where a tile has more of them than there is room for, the bisection reads the whole row instead.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.triton.tiles import FINE, Numbers, Tiles, exponential, merged, rate, read_tile, warmth

_ROOM = 512  # groups that a tile may collect
_LANES = 2048  # collected tokens that are looked at together
_BINS = 64  # in which tokens are counted: what is lighter than the last of them weighs next to nothing
_SHIFT = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0, torch.float64: 0}  # bits a float32 copy has too many
_GROUP = tl.constexpr(4)  # neighbours, which one thread holds; collected together where one of them is above the floor


@triton.jit
def _key(b_x, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """Integers that order as x does, without the SHIFT low bits, which x has none of."""
    if WIDE:
        b_bits = b_x.to(tl.int64, bitcast=True)
        return b_bits ^ ((b_bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        b_bits = b_x.to(tl.int32, bitcast=True)
        return (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _value(key, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """The x whose key this is."""
    if WIDE:
        return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        k = key << SHIFT
        return (((k ^ ((k >> 31) & 0x7FFFFFFF)) >> SHIFT) << SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def _halfway(low, high):
    """Half the sum, rounded up; the sum might overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _floor_of_tile(b_top, top_k, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """A logit that top_k to 2 top_k groups are not below, whose largest logits are b_top; -inf if there are fewer groups."""
    b_key = _key(b_top, SHIFT, WIDE)
    low, high = _key(tl.full((), -float("inf"), b_top.dtype), SHIFT, WIDE), tl.max(b_key)
    while low < high:
        middle = _halfway(low, high)
        groups = tl.sum((b_key >= middle).to(tl.int32))
        high = tl.where(groups < top_k, middle - 1, tl.where(groups > 2 * top_k, high, middle))
        low = tl.where(groups < top_k, low, middle)
    return _value(low, SHIFT, WIDE)


@triton.jit
def _depth_of_row(p_bins, p_part, i_row, tiles, peak, left, pace, BINS: tl.constexpr, PARTS: tl.constexpr):
    """How many bins below the peak lie all tokens but some that weigh less than what is left; BINS if that is not known."""
    o_t, o_b = tl.arange(0, PARTS)[:, None], tl.arange(0, BINS)[None, :]
    at, mask = i_row * tiles + o_t, o_t < tiles
    b_count = tl.load(p_bins + at * BINS + o_b, mask=mask, other=0).to(tl.float32)
    b_top = tl.load(p_part + at * 3, mask=mask, other=-float("inf"))
    # [PARTS, BINS]: so many bins below the peak each begins and ends
    b_from = o_b + ((peak - b_top) * pace).to(tl.float32) * FINE
    b_end = tl.where(o_b < BINS - 1, b_from + 1, float("inf"))
    b_weight = b_count * tl.exp2(-b_from / FINE)  # at most
    low, high = 0, BINS
    while low < high:
        middle = (low + high) // 2
        enough = tl.sum(tl.sum(tl.where(b_end > middle, b_weight, 0.0), 1)) < left
        low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
    return low


@triton.jit
def _weight_above(
    p_from, b_count, stride, least, peak, pace,
    MASS: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of the collected tokens whose logit is not below the least: their exponentials, or their number."""
    o_t, o = tl.arange(0, TILES)[:, None], tl.arange(0, LANES // TILES)[None, :]
    b_sum = tl.zeros([TILES, LANES // TILES], tl.float64)
    for start in range(0, tl.max(b_count), LANES // TILES):
        b_mask = start + o < b_count[:, None]
        b_x = tl.load(p_from + o_t * stride + start + o, mask=b_mask, other=-float("inf"))
        b_x = b_x.to(tl.float64 if WIDE else tl.float32)
        b_weight = exponential(b_x, peak, least, pace) if MASS else tl.full(b_x.shape, 1.0, b_x.dtype)
        b_sum += tl.where(b_mask & (b_x >= least), b_weight, 0.0).to(tl.float64)
    return tl.sum(b_sum)


@triton.jit
def _least_kept(
    p_from, b_count, stride, low, high, due, peak, pace,
    MASS: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The largest logit with keys in [low, high] from which on up there is a weight of what is due; that of low if none is."""
    while low < high:
        middle = _halfway(low, high)
        least = _value(middle, SHIFT, WIDE)
        if _weight_above(p_from, b_count, stride, least, peak, pace, MASS, WIDE, TILES, LANES) >= due:
            low = middle
        else:
            high = middle - 1
    return _value(low, SHIFT, WIDE)


@triton.jit
def _narrowed(
    p_logits, p_some, p_found, i_row, vocab, tiles, floor, peak, total, pace, top_k, top_p, drop,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, ROOM: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(cut, total) of a row whose tiles have all collected their tokens, or in place of `total` NaN if that is NaN."""
    o_t = tl.arange(0, TILES)
    b_count = tl.load(p_found + i_row * tiles + o_t, mask=o_t < tiles, other=0)
    p_from, stride = p_some + i_row * tiles * ROOM * _GROUP, tiles * 0 + ROOM * _GROUP
    if tl.max(b_count) > stride:
        p_from, stride = p_logits + i_row * vocab, tl.cdiv(vocab, tiles)
        b_count = tl.minimum(tl.maximum(vocab - o_t * stride, 0), stride)
    high, cut, due = _key(peak, SHIFT, WIDE), floor, total
    if TOP_K:
        low = _key(tl.full((), -float("inf"), peak.dtype), SHIFT, WIDE)
        cut = _least_kept(p_from, b_count, stride, low, high, top_k, peak, pace, False, SHIFT, WIDE, TILES, LANES)
    if TOP_P:
        if TOP_K:
            due = _weight_above(p_from, b_count, stride, cut, peak, pace, True, WIDE, TILES, LANES)
        due = tl.maximum(due * top_p, due * 1e-9)
        low = _key(cut, SHIFT, WIDE)
        least = _least_kept(p_from, b_count, stride, low, high, due, peak, pace, True, SHIFT, WIDE, TILES, LANES)
        cut = tl.maximum(cut, least)
    cut = tl.maximum(cut, peak + drop)
    kept = _weight_above(p_from, b_count, stride, cut, peak, pace, True, WIDE, TILES, LANES)
    return cut, tl.where(total == total, kept, total)


@triton.jit(do_not_specialize=["top_k"])
def _filter_kernel(
    p_logits, p_part, p_first, p_arrived, p_bins, p_some, p_found, p_law, p_best,
    vocab, tiles, temperature, top_k, top_p, left, drop,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    LINE: tl.constexpr, ROOM: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, b_stored = read_tile(p_logits, i_row, i_tile, vocab, tiles, BLOCK, LINE)
    b_x, pace = b_stored.to(tl.float64 if WIDE else tl.float32), rate(temperature, WIDE)
    b_top = tl.max(tl.reshape(b_x, [BLOCK // _GROUP, _GROUP]), 1)
    peak, _, total, first = merged(p_part, p_first, i_row, tiles, temperature, False, PARTS)
    peak = peak.to(b_top.dtype)
    floor = peak + drop
    if TOP_K:
        floor = _floor_of_tile(b_top, top_k, SHIFT, WIDE)
    elif TOP_P:  # all tokens below it together weigh too little for one of them to be the last one kept
        left = (total * left).to(tl.float32)
        depth = _depth_of_row(p_bins, p_part, i_row, tiles, peak, 0.999 * left, pace, BINS, PARTS)
        depth = tl.minimum(tl.where(depth < BINS, depth.to(tl.float32) / FINE, float("inf")), -tl.log2(left / vocab))
        floor = peak - (depth + 0.01).to(b_top.dtype) / pace
    at = i_row * tiles + i_tile
    b_place = tl.cumsum((b_top >= floor).to(tl.int32), 0)  # [BLOCK // _GROUP]
    b_mask = (b_top >= floor) & (b_place <= ROOM)
    p_group = p_some + (at * ROOM + b_place - 1)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    tl.store(p_group, tl.reshape(b_stored, [BLOCK // _GROUP, _GROUP]), mask=b_mask[:, None])
    tl.store(p_found + at, tl.max(b_place) * _GROUP)
    tl.debug_barrier()  # what all threads stored is there before the program says that it arrived
    if tl.atomic_add(p_arrived + i_row, 1) == tiles - 1:
        cut, kept = _narrowed(
            p_logits, p_some, p_found, i_row, vocab, tiles, floor, peak, total, pace, top_k, top_p, drop,
            TOP_K, TOP_P, SHIFT, WIDE, ROOM, PARTS, LANES,
        )  # fmt: skip
        tl.store(p_law + i_row * 3, peak.to(tl.float64))
        tl.store(p_law + i_row * 3 + 1, cut.to(tl.float64))
        tl.store(p_law + i_row * 3 + 2, kept)
        tl.store(p_best + i_row, first)
        tl.store(p_arrived + i_row, 0)


class Filters(NamedTuple):
    """What cuts tokens off a law."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None

    @classmethod
    def of(
        cls, vocab: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
    ) -> Filters | None:
        """None where nothing is cut off; at temperature 0 nothing needs to be."""
        filters = cls(
            temperature,
            top_k if top_k is not None and top_k < vocab else None,
            top_p if top_p is not None and top_p < 1 else None,
            min_p or None,
        )
        return filters if temperature > 0 and any(x is not None for x in filters[1:]) else None

    @property
    def bins(self) -> int:
        """By how many powers of two the first launch must count tokens."""
        return _BINS if self.top_p is not None and self.top_k is None else 0

    def narrow(self, logits: Tensor, tiles: Tiles, numbers: Numbers) -> Numbers:
        """Those of whole rows under the filters, from those of tiles without them; the count of arrivals is handed on."""
        rows, vocab = logits.shape
        room, heat = min(_ROOM, tiles.block // _GROUP.value), warmth(self.temperature)
        some, found = (
            logits.new_empty(rows, tiles.count, room, _GROUP.value),
            numbers.arrived.new_empty(rows, tiles.count),
        )
        law, best = numbers.part.new_empty(rows, 1, 3), numbers.first.new_empty(rows, 1)
        left = 0.0 if self.top_p is None else 1 - self.top_p
        drop = heat * math.log(self.min_p) if self.min_p else -math.inf
        _filter_kernel[(rows, tiles.count)](
            logits, *numbers, some, found, law, best, vocab, tiles.count, heat, self.top_k or 0, self.top_p or 0.0,
            left, drop, TOP_K=self.top_k is not None, TOP_P=self.top_p is not None, SHIFT=_SHIFT[logits.dtype],
            WIDE=logits.dtype == torch.float64, ROOM=room, BINS=self.bins, LANES=max(_LANES, numbers.flags["PARTS"]),
            **numbers.flags, **tiles.flags,
        )  # fmt: skip
        return Numbers(law, best, *numbers[2:])
