"""Top k in two launches: the k best of every block of a row with its log-sum, and the k best of those.

A logit and its place share an int64 whose order is that of logits and, among equals, of the smaller place first; the best
is taken k times, so nothing is sorted: meant for the k of a tree, not for hundreds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pack(b_x, o):
    """int64: the order of float32 above, places 0 <= o < 2**31 backwards below."""
    b_bits = (b_x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    b_key = (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (b_key << 32) | (0x7FFFFFFF - o).to(tl.int64)


@triton.jit
def _block_kernel(p_logits, p_best, p_peak, p_total, vocab, k, temperature, BLOCK: tl.constexpr):
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_out = i_row * tl.num_programs(1) + i_block
    o_v = i_block * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_logits + i_row * vocab + o_v, mask=o_v < vocab, other=-float("inf")).to(tl.float32)  # [BLOCK]
    peak = tl.max(b_x)
    b_e = tl.where(b_x == -float("inf"), 0.0, tl.exp((b_x - peak) / temperature))
    tl.store(p_peak + i_out, peak)
    tl.store(p_total + i_out, tl.sum(b_e))
    b_pack = tl.where(o_v < vocab, _pack(b_x, o_v), -0x7FFFFFFFFFFFFFFF)
    for j in range(k):
        best = tl.max(b_pack)
        tl.store(p_best + i_out * k + j, best)
        b_pack = tl.where(b_pack == best, -0x7FFFFFFFFFFFFFFF, b_pack)


@triton.jit
def _merge_kernel(
    p_best, p_peak, p_total, p_logp, p_token, blocks, k, temperature, BLOCKS: tl.constexpr, MANY: tl.constexpr
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_b, o_c = tl.arange(0, BLOCKS), tl.arange(0, MANY)
    b_peak = tl.load(p_peak + i_row * blocks + o_b, mask=o_b < blocks, other=-float("inf"))  # [BLOCKS]
    b_total = tl.load(p_total + i_row * blocks + o_b, mask=o_b < blocks, other=0.0)  # [BLOCKS]
    peak = tl.max(b_peak)
    b_e = tl.where(b_peak == -float("inf"), 0.0, b_total * tl.exp((b_peak - peak) / temperature))
    log_total = tl.log(tl.sum(b_e))
    b_pack = tl.load(p_best + i_row * blocks * k + o_c, mask=o_c < blocks * k, other=-0x7FFFFFFFFFFFFFFF)  # [MANY]
    for j in range(k):
        best = tl.max(b_pack)
        b_pack = tl.where(b_pack == best, -0x7FFFFFFFFFFFFFFF, b_pack)
        key = (best >> 32).to(tl.int32)
        x = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(p_logp + i_row * k + j, (x - peak) / temperature - log_total)
        tl.store(p_token + i_row * k + j, 0x7FFFFFFF - (best & 0x7FFFFFFF))


def topk(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    block = min(4096, triton.next_power_of_2(vocab))
    blocks = triton.cdiv(vocab, block)
    best = logits.new_empty((rows, blocks, k), dtype=torch.int64)
    peak, total = (logits.new_empty((rows, blocks), dtype=torch.float32) for _ in range(2))
    dtype = torch.promote_types(logits.dtype, torch.float32)  # of what is returned: the arithmetic is that of float32
    out = logits.new_empty((rows, k), dtype=dtype), logits.new_empty((rows, k), dtype=torch.int64)
    _block_kernel[(rows, blocks)](
        logits.contiguous(), best, peak, total, vocab, k, temperature, BLOCK=block, num_warps=8, enable_fp_fusion=True
    )
    _merge_kernel[(rows,)](
        best, peak, total, *out, blocks, k, temperature,
        BLOCKS=triton.next_power_of_2(blocks), MANY=triton.next_power_of_2(blocks * k), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
