"""Products with matrices stored in integers: a few tokens times a matrix that is read as it is stored.

A launch rounds the tokens, a second one multiplies. A program has some tiles of 16 outputs and up to 64 tokens, and goes
through the groups of 32 inputs: products of a group are exact, in one step of the tensor cores, and are scaled and added in
float32. Sums of integers begin at the bits of the float32 number 1.5 * 2^23, whose last bits they then are: subtracting it
converts them, and a multiprocessor does eight times as many subtractions as conversions.

A matrix of few outputs has few programs: then each takes a part of the groups, and their sums are added.

By arithmetic, not measured: 14336 x 4096 takes 13.7 us to be read in int8 on an H200 and 8.5 us in int4 (27 us in bfloat16), at
4.3 TB/s. The loop over groups has 111 and 187 instructions for sm_90 at 16 tokens, 182 and 311 at 64 (counted): 14 and 23 us,
23 and 38 us, if a multiprocessor issues four a clock. So integers save time for few tokens, and room always.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.backend import chip
from specdec_kernels.configs import STORED

OUTPUTS: tl.constexpr = tl.constexpr(16)  # of a tile
GROUP: tl.constexpr = tl.constexpr(32)  # inputs
LEAST: tl.constexpr = tl.constexpr(2.0**-100)  # as in the reference
MAGIC: tl.constexpr = tl.constexpr(1.5 * 2.0**23)  # integers up to 2^22 added to it are the last bits of the sum
MAGIC_BITS: tl.constexpr = tl.constexpr(0x4B400000)
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)  # as bits: the least that is no finite number
GROUPS: tl.constexpr = tl.constexpr(32)  # that a program rounds

RESIDENT = 3  # programs that a multiprocessor has room for, by their registers
LEAST_GROUPS = 8  # that are worth a program: what it begins with and ends with takes as long as one or two


@triton.jit(do_not_specialize=["inputs", "groups"])
def _round_kernel(x, whole, scale, offset, inputs, groups):
    """Grid [tokens, blocks of groups]. No operation may be fused: the reference rounds each. offset: sums, in whole scales."""
    token, o_g = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    o_i = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    b_x = tl.load(x + token * inputs + o_i, mask=o_i < inputs, other=0.0)
    b_bits = tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    b_finite, b_most = b_bits < INFINITE, b_bits.to(tl.float32, bitcast=True)
    b_counts = b_finite & (b_most >= LEAST)
    b_inverse = tl.where(b_counts, tl.div_rn(127.0, tl.where(b_counts, b_most, 1.0)), 0.0)
    b_whole = (tl.where(b_counts[:, None], b_x, 0.0) * b_inverse[:, None] + MAGIC) - MAGIC
    b_scale = tl.where(b_counts, tl.div_rn(b_most, 127.0), tl.where(b_finite, 0.0, float("nan")))
    at = o_g * tl.num_programs(0) + token
    tl.store(whole + token * groups * GROUP + o_i, b_whole.to(tl.int8), mask=o_g[:, None] < groups)
    tl.store(scale + at, b_scale, mask=o_g < groups)
    tl.store(offset + at, b_scale * tl.sum(b_whole, 1), mask=o_g < groups)


@triton.jit
def load_matrix(weight, place, m_tile, TILES: tl.constexpr, HALVES: tl.constexpr):
    """[outputs, GROUP] int8: a group of each tile, of which `place` is the first byte."""
    BYTES: tl.constexpr = OUTPUTS * GROUP // HALVES
    b_stored = tl.load(weight + place[:, None] + tl.arange(0, BYTES)[None, :], mask=m_tile[:, None], other=0)
    if HALVES == 2:
        b_stored = tl.reshape(b_stored, (TILES, 4, OUTPUTS, 4))  # [tile, v, output, i]
        b_whole = tl.permute(tl.join(b_stored & 15, b_stored >> 4), (0, 2, 4, 1, 3))  # [tile, output, half, v, i]
    else:
        b_whole = tl.permute(tl.reshape(b_stored ^ 128, (TILES, 8, OUTPUTS, 4)), (0, 2, 1, 3))
    return tl.reshape(b_whole, (TILES * OUTPUTS, GROUP)).to(tl.int8, bitcast=True)


@triton.jit
def load_grid(scales, place, m_tile, TILES: tl.constexpr):
    """Steps and least values [outputs] of a group of each tile, of which `place` is the first: side by side, as copies go."""
    at = scales + place[:, None] + tl.arange(0, 2 * OUTPUTS)[None, :]
    b_both = tl.reshape(tl.load(at, mask=m_tile[:, None], other=0.0), (TILES, 2, OUTPUTS))
    b_step, b_least = tl.split(tl.permute(b_both, (0, 2, 1)))
    return tl.reshape(b_step, (TILES * OUTPUTS,)).to(tl.float32), tl.reshape(b_least, (TILES * OUTPUTS,)).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "outs", "tiles", "part"])
def _stored_kernel(
    whole, scale, offset, weight, scales, out, tokens, outs, tiles, groups, part,
    BLOCK: tl.constexpr, TILES: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid [blocks of tiles, blocks of tokens, splits of `part` groups]. HALVES: numbers in a byte, 1 in int8 and 2 in int4.

    Outputs are the rows of what is computed: a thread has few of them, whose scales it converts, and many tokens.
    """
    o_tile, o_t = tl.program_id(0) * TILES + tl.arange(0, TILES), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_n = tl.program_id(0) * TILES * OUTPUTS + tl.arange(0, TILES * OUTPUTS)
    m_tile, m_t, m_n, o_g = o_tile < tiles, o_t < tokens, o_n < tiles * OUTPUTS, tl.arange(0, GROUP)
    first_group, row = o_tile.to(tl.int64) * groups, o_t.to(tl.int64) * groups
    b_sum = tl.zeros([TILES * OUTPUTS, BLOCK], tl.float32)
    first = tl.program_id(2) * part
    for group in tl.range(first, tl.minimum(first + part, groups), num_stages=STAGES):
        b_w = load_matrix(weight, (first_group + group) * (OUTPUTS * GROUP // HALVES), m_tile, TILES, HALVES)
        b_x = tl.load(whole + (row[:, None] + group) * GROUP + o_g[None, :], mask=m_t[:, None], other=0)
        b_scale = tl.load(scale + group * tokens + o_t, mask=m_t, other=0.0)[None, :]
        b_start = tl.full([TILES * OUTPUTS, BLOCK], MAGIC_BITS, tl.int32)
        b_products = tl.dot(b_w, tl.trans(b_x), b_start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - MAGIC
        if HALVES == 2:
            b_step, b_least = load_grid(scales, (first_group + group) * 2 * OUTPUTS, m_tile, TILES)
            b_offset = tl.load(offset + group * tokens + o_t, mask=m_t, other=0.0)[None, :]
            b_sum += b_products * b_step[:, None] * b_scale
            b_sum += b_least[:, None] * b_offset
        else:
            b_sum += b_products * b_scale
    if HALVES == 1:
        b_sum *= tl.load(scales + o_n, mask=m_n, other=0.0)[:, None]
    place = out + (tl.program_id(2) * tokens + o_t).to(tl.int64)[None, :] * outs + o_n[:, None]
    tl.store(place, b_sum, mask=m_t[None, :] & (o_n < outs)[:, None])


def stored_linear(x: Tensor, weight: Tensor, scales: Tensor, outs: int) -> Tensor:
    """Launch on the current device. x: [token, in] float32; weight, scales: of `pack_int8` or `pack_int4`."""
    halves, tiles = (2 if scales.dim() == 4 else 1), len(weight)
    tokens, groups = len(x), weight.shape[1] // (1 if halves == 2 else 8)
    whole, scale = x.new_empty(tokens, groups * 32, dtype=torch.int8), x.new_empty(groups, tokens)
    offset, config = torch.empty_like(scale), STORED[16 if tokens <= 16 else 64]
    blocks = triton.cdiv(tiles, config.tiles), triton.cdiv(tokens, config.tokens)
    part = part_of(groups, math.prod(blocks), chip().processors)
    out = x.new_empty(triton.cdiv(groups, part), tokens, outs)
    if not tokens:
        return out[0]
    _round_kernel[tokens, triton.cdiv(groups, 32)](
        x, whole, scale, offset, x.shape[1], groups, enable_fp_fusion=False
    )  # fmt: skip
    _stored_kernel[*blocks, len(out)](
        whole, scale, offset, weight, scales, out, tokens, outs, tiles, groups, part, BLOCK=config.tokens,
        TILES=config.tiles, HALVES=halves, STAGES=config.stages, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out[0] if len(out) == 1 else out.sum(0)


def part_of(groups: int, blocks: int, processors: int) -> int:
    """How many groups of inputs a program takes: all, or fewer if there are programs too few to fill the processors."""
    splits = min(max(RESIDENT * processors // max(blocks, 1), 1), max(groups // LEAST_GROUPS, 1))
    return triton.cdiv(groups, splits)
