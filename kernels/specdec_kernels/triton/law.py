"""The law of every row of logits: one launch over tiles of the vocabulary, and one that merges their numbers or filters."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.triton.filters import Filters
from specdec_kernels.triton.tiles import Tiles, merged, tile_numbers, warmth


@triton.jit
def _tile_kernel(
    p_logits, p_part, p_first, p_arrived, p_bins, vocab, tiles, temperature,
    GREEDY: tl.constexpr, WIDE: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    i_row, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tile_numbers(
        p_logits, p_part, p_first, p_arrived, p_bins, i_row, i_tile, vocab, tiles, temperature,
        GREEDY, WIDE, BINS, BLOCK, LINE,
    )  # fmt: skip


@triton.jit
def _merge_kernel(p_part, p_first, p_law, p_best, parts, temperature, GREEDY: tl.constexpr, PARTS: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    peak, cut, total, first = merged(p_part, p_first, i_row, parts, temperature, GREEDY, PARTS)
    tl.store(p_law + i_row * 3, peak)
    tl.store(p_law + i_row * 3 + 1, cut)
    tl.store(p_law + i_row * 3 + 2, total)
    tl.store(p_best + i_row, first)


def law(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[Tensor, Tensor]:
    logits, rows, vocab = logits.contiguous(), *logits.shape
    tiles, filters = Tiles.of(logits), Filters.of(vocab, temperature, top_k, top_p, min_p)
    bins = filters.bins if filters else 0
    numbers, heat, greedy = tiles.numbers(logits, rows, bins), warmth(temperature), temperature == 0
    _tile_kernel[(rows, tiles.count)](
        logits, *numbers, vocab, tiles.count, heat, GREEDY=greedy, WIDE=logits.dtype == torch.float64, BINS=bins,
        **tiles.flags,
    )  # fmt: skip
    if filters:
        part, first, *_ = filters.narrow(logits, tiles, numbers)
        return part[:, 0], first[:, 0]
    out = logits.new_empty((rows, 3), dtype=torch.float64), logits.new_empty(rows, dtype=torch.int64)
    _merge_kernel[(rows,)](
        *numbers[:2], *out, tiles.count, heat, GREEDY=greedy, num_warps=1, enable_fp_fusion=True, **numbers.flags
    )
    return out
