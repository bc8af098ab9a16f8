"""Every node climbs to the root and sets the bit of whom it meets: one program per row and block of nodes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tree_build_kernel(
    p_parents, p_words, p_depths, nodes, words, depth, WORDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_n, o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WORDS)
    mask = o_n < nodes
    p_parents += i_row * nodes
    b_at = o_n.to(tl.int64)  # [BLOCK]: the ancestor that each node has climbed to, -1 above the root
    b_words = tl.zeros([BLOCK, WORDS], tl.int32)
    b_depth = tl.full([BLOCK], -1, tl.int64)
    for _ in range(depth + 1):
        b_bit = (1 << (b_at & 31)).to(tl.int32)  # [BLOCK]
        b_here = ((b_at >> 5)[:, None] == o_w[None, :]) & (b_at >= 0)[:, None]
        b_words |= tl.where(b_here, b_bit[:, None], 0)
        b_depth += (b_at >= 0).to(tl.int64)
        b_at = tl.load(p_parents + b_at, mask=mask & (b_at >= 0), other=-1)
    p_words += (i_row * nodes + o_n[:, None]) * words + o_w[None, :]
    tl.store(p_words, b_words, mask=mask[:, None] & (o_w < words)[None, :])
    tl.store(p_depths + i_row * nodes + o_n, b_depth, mask=mask)


def tree_build(parents: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    batch, nodes = parents.shape
    words, block = triton.cdiv(nodes, 32), min(64, triton.next_power_of_2(nodes))
    out = parents.new_empty((batch, nodes, words), dtype=torch.int32), parents.new_empty((batch, nodes))
    _tree_build_kernel[(batch, triton.cdiv(nodes, block))](
        parents.contiguous(), *out, nodes, words, depth,
        WORDS=triton.next_power_of_2(words), BLOCK=block, num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip
    return out
