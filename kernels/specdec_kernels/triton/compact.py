"""Compaction in place: one program owns a piece of all slots of one layer and row, loads what is kept, then stores it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["batch", "steps"])
def _compact_kernel(
    p_stack, p_path, p_lengths, p_count, batch, slots, steps, size, STEPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_layer, i_row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n = tl.arange(0, STEPS)
    o_d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    b_node = tl.load(p_path + i_row * steps + o_n, mask=o_n < steps, other=0)  # [STEPS]
    kept = tl.minimum(tl.load(p_count + i_row), steps)
    p_scratch = p_stack + ((i_layer * batch + i_row) * slots + tl.load(p_lengths + i_row)) * size
    mask = (o_n > 0)[:, None] & (o_n < kept)[:, None] & (o_d < size)[None, :]
    b_state = tl.load(p_scratch + b_node[:, None] * size + o_d[None, :], mask=mask)  # [STEPS, BLOCK]
    tl.debug_barrier()  # a slot that is stored to may be one that another warp still has to load
    tl.store(p_scratch + o_n.to(tl.int64)[:, None] * size + o_d[None, :], b_state, mask=mask)


def compact(stack: Tensor, path: Tensor, lengths: Tensor, count: Tensor) -> None:
    layers, batch, slots, heads, dim = stack.shape
    steps, size = path.shape[1], heads * dim
    rows = triton.next_power_of_2(steps)
    block = max(min(8192 // rows, triton.next_power_of_2(size)), 16)
    _compact_kernel[(layers, batch, triton.cdiv(size, block))](
        stack,
        path.contiguous(),
        lengths,
        count,
        batch,
        slots,
        steps,
        size,
        STEPS=rows,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
