"""Products with matrices stored in integers: a few tokens times a matrix that is read as it is stored.

A launch rounds the tokens, a second one multiplies. A program has some tiles of 16 outputs and up to 64 tokens, and goes
through the groups of 32 inputs: products of a group are exact, in one step of the tensor cores, and are scaled and added in
float32. Sums of integers begin at the bits of the float32 number 1.5 * 2^23, whose last bits they then are: subtracting it
converts them, and a multiprocessor does eight times as many subtractions as conversions.

By arithmetic, not measured: 14336 x 4096 takes 13.7 us to be read in int8 on an H200 and 8.5 us in int4 (27 us in bfloat16), at
4.3 TB/s. What is done in float32 for each token, output and group, two operations in int8, takes 8 us at 64 tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.configs import STORED

OUTPUTS: tl.constexpr = tl.constexpr(16)  # of a tile
GROUP: tl.constexpr = tl.constexpr(32)  # inputs
LEAST: tl.constexpr = tl.constexpr(2.0**-100)  # as in the reference
MAGIC: tl.constexpr = tl.constexpr(1.5 * 2.0**23)  # integers up to 2^22 added to it are the last bits of the sum
MAGIC_BITS: tl.constexpr = tl.constexpr(0x4B400000)
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)  # as bits: the least that is no finite number
GROUPS: tl.constexpr = tl.constexpr(32)  # that a program rounds


@triton.jit(do_not_specialize=["inputs", "groups"])
def _round_kernel(x, whole, scale, inputs, groups):
    """Grid [tokens, blocks of groups]. No operation may be fused: the reference rounds each."""
    token, o_g = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    o_i = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    b_x = tl.load(x + token * inputs + o_i, mask=o_i < inputs, other=0.0)
    b_bits = tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    b_finite, b_most = b_bits < INFINITE, b_bits.to(tl.float32, bitcast=True)
    b_counts = b_finite & (b_most >= LEAST)
    b_inverse = tl.where(b_counts, tl.div_rn(127.0, tl.where(b_counts, b_most, 1.0)), 0.0)
    b_whole = (tl.where(b_counts[:, None], b_x, 0.0) * b_inverse[:, None] + MAGIC) - MAGIC
    b_scale = tl.where(b_counts, tl.div_rn(b_most, 127.0), tl.where(b_finite, 0.0, float("nan")))
    tl.store(whole + token * groups * GROUP + o_i, b_whole.to(tl.int8), mask=o_g[:, None] < groups)
    tl.store(scale + token * groups + o_g, b_scale, mask=o_g < groups)


@triton.jit
def load_matrix(weight, place, m_tile, TILES: tl.constexpr, HALVES: tl.constexpr):
    """[GROUP, outputs] int8: a group of each tile, of which `place` is the first byte."""
    BYTES: tl.constexpr = OUTPUTS * GROUP // HALVES
    b_stored = tl.load(weight + place[:, None] + tl.arange(0, BYTES)[None, :], mask=m_tile[:, None], other=0)
    if HALVES == 2:
        b_stored = tl.reshape(b_stored, (TILES, 4, OUTPUTS, 4))  # [tile, v, output, i]
        b_whole = tl.permute(tl.join(b_stored & 15, b_stored >> 4), (0, 2, 4, 1, 3))  # [tile, output, half, v, i]
    else:
        b_whole = tl.permute(tl.reshape(b_stored ^ 128, (TILES, 8, OUTPUTS, 4)), (0, 2, 1, 3))
    return tl.trans(tl.reshape(b_whole, (TILES * OUTPUTS, GROUP)).to(tl.int8, bitcast=True))


@triton.jit(do_not_specialize=["tokens", "outs"])
def _stored_kernel(
    whole, scale, weight, scales, out, tokens, outs, tiles, groups,
    BLOCK: tl.constexpr, TILES: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid [blocks of tiles, blocks of tokens]. HALVES: numbers in a byte, 1 in int8 and 2 in int4."""
    o_tile, o_t = tl.program_id(0) * TILES + tl.arange(0, TILES), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_n = tl.program_id(0) * TILES * OUTPUTS + tl.arange(0, TILES * OUTPUTS)
    m_tile, m_t, o_g = o_tile < tiles, o_t < tokens, tl.arange(0, GROUP)
    first_group, row = o_tile.to(tl.int64) * groups, o_t.to(tl.int64) * groups
    of_output = (o_n // OUTPUTS).to(tl.int64) * groups * 2 * OUTPUTS + o_n % OUTPUTS
    m_n = o_n < tiles * OUTPUTS
    b_sum = tl.zeros([BLOCK, TILES * OUTPUTS], tl.float32)
    for group in tl.range(0, groups, num_stages=STAGES):
        b_x = tl.load(whole + (row[:, None] + group) * GROUP + o_g[None, :], mask=m_t[:, None], other=0)
        b_w = load_matrix(weight, (first_group + group) * (OUTPUTS * GROUP // HALVES), m_tile, TILES, HALVES)
        b_scale = tl.load(scale + row + group, mask=m_t, other=0.0)[:, None]
        b_start = tl.full([BLOCK, TILES * OUTPUTS], MAGIC_BITS, tl.int32)
        b_products = tl.dot(b_x, b_w, b_start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - MAGIC
        if HALVES == 2:
            at = scales + of_output + group * 2 * OUTPUTS
            b_step = tl.load(at, mask=m_n, other=0.0).to(tl.float32)[None, :]
            b_least = tl.load(at + OUTPUTS, mask=m_n, other=0.0).to(tl.float32)[None, :]
            b_total = tl.sum(b_x.to(tl.int32), 1).to(tl.float32)[:, None]
            b_sum += (b_products * b_step + b_least * b_total) * b_scale
        else:
            b_sum += b_products * b_scale
    if HALVES == 1:
        b_sum *= tl.load(scales + o_n, mask=m_n, other=0.0)[None, :]
    place = out + o_t.to(tl.int64)[:, None] * outs + o_n[None, :]
    tl.store(place, b_sum, mask=m_t[:, None] & (o_n < outs)[None, :])


def stored_linear(x: Tensor, weight: Tensor, scales: Tensor, outs: int) -> Tensor:
    """Launch on the current device. x: [token, in] float32; weight, scales: of `pack_int8` or `pack_int4`."""
    halves, tiles = (2 if scales.dim() == 4 else 1), len(weight)
    tokens, groups = len(x), weight.shape[1] // (1 if halves == 2 else 8)
    whole, scale = x.new_empty(tokens, groups * 32, dtype=torch.int8), x.new_empty(tokens, groups)
    out = x.new_empty(tokens, outs)
    if not tokens:
        return out
    config = STORED[16 if tokens <= 16 else 64]
    _round_kernel[tokens, triton.cdiv(groups, 32)](x, whole, scale, x.shape[1], groups, enable_fp_fusion=False)
    _stored_kernel[triton.cdiv(tiles, config.tiles), triton.cdiv(tokens, config.tokens)](
        whole, scale, weight, scales, out, tokens, outs, tiles, groups, BLOCK=config.tokens, TILES=config.tiles,
        HALVES=halves, STAGES=config.stages, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out
