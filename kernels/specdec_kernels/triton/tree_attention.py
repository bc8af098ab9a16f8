"""Tree attention: packed rows, unmasked tiles over the prefix, masked ones where it begins and over the tree.

One program owns BLOCK_M of the node x group rows of one KV head, and one of several even shares of the tiles its rows see.
Tiles of BLOCK_N slots end where the tree begins; then come tiles of 32 nodes, the bits of one word. Softmaxes run in base 2.
Names: b_ holds a block, o_ offsets, p_ pointers, m_ masks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from specdec_kernels import plan, tma
from specdec_kernels.backend import UPCAST, chip
from specdec_kernels.configs import attention_config

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2))
WORD: tl.constexpr = tl.constexpr(32)
MERGE_ROWS, MERGE_SPLITS = 4, 16  # of a tile: a row to each warp


@triton.jit
def load_slots(p_x, start, stride, m_slot, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr,
               UPCAST: tl.constexpr):  # fmt: skip
    """[BLOCK_N, BLOCK_DIM]: the slots from `start` on where m_slot [BLOCK_N]; zeros elsewhere and past DIM."""
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_DIM)
    p_x += tl.cast(start, tl.int64) * stride
    m_x = m_slot[:, None] & (o_d < DIM)[None, :]
    b_x = tl.load(p_x + o_n[:, None] * stride + o_d[None, :], mask=m_x, other=0.0)
    return b_x.to(tl.float32) if UPCAST else b_x


@triton.jit
def load_tile(x, p_x, at, start, stride, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr,
              TMA: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """[BLOCK_N, BLOCK_DIM]: the slots from `start` on, all of them there; zeros past DIM.

    TMA: the order of axes of the descriptor x, "by slot" or "by head" (`specdec_kernels.tma`); None if there is none.
    """
    if TMA is None:
        return load_slots(p_x, start, stride, tl.full([BLOCK_N], 1, tl.int1), DIM, BLOCK_N, BLOCK_DIM, UPCAST)
    else:
        b_x = x.load([at[0], start, at[1], 0] if TMA == "by slot" else [at[0], at[1], start, 0])
        b_x = b_x.reshape(BLOCK_N, BLOCK_DIM)
        return b_x.to(tl.float32) if UPCAST else b_x


@triton.jit
def scores(b_q, b_k, scale, cap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: times log2(e)."""
    # [BLOCK_M, BLOCK_D] x [BLOCK_D, BLOCK_N]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + exp(2x)), the constants are in scale and cap
        b_s = cap * (1 - 2 / (1 + tl.exp2(b_s)))
    return b_s


@triton.jit
def update(state, b_s, b_v, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """The online softmax after scores b_s [BLOCK_M, BLOCK_N] and values b_v [BLOCK_N, BLOCK_V]."""
    b_acc, b_m, b_l = state
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_max = tl.where(b_m_new == -float("inf"), 0.0, b_m_new) if MASKED else b_m_new  # nothing seen: inf - inf is NaN
    b_p = tl.exp2(b_s - b_max[:, None])
    b_decay = tl.exp2(b_m - b_max)
    # [BLOCK_M, BLOCK_N] x [BLOCK_N, BLOCK_V]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
    return b_acc, b_m_new, b_l * b_decay + tl.sum(b_p, 1)


@triton.jit
def begin(sinks, o_h, split, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SINKS: tl.constexpr):
    """An empty online softmax: accumulator, maximum, sum. A sink is a logit that the first split saw before everything else."""
    if SINKS:
        b_sink = tl.load(sinks + o_h).to(tl.float32) * LOG2E
        b_m = tl.where(split == 0, b_sink, -float("inf"))
        b_l = tl.full([ROWS], 1.0, tl.float32)  # what is added to -inf is forgotten
    else:
        b_m = tl.full([ROWS], -float("inf"), tl.float32)
        b_l = tl.zeros([ROWS], tl.float32)
    return tl.zeros([ROWS, COLUMNS], tl.float32), b_m, b_l


@triton.jit
def store(state, out, lse, o_row, m_row, columns, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Normalise, and write rows o_row of lse [row] (natural) and of out [row, DIM], of this so many columns."""
    b_acc, b_m, b_l = state
    o_d = tl.arange(0, BLOCK_DIM)
    b_sum = tl.where(b_l > 0, b_l, 1.0)
    p_out = out + o_row.to(tl.int64)[:, None] * DIM + o_d[None, :]
    tl.store(p_out, (b_acc / b_sum[:, None]).to(out.dtype.element_ty), mask=m_row[:, None] & (o_d < columns)[None, :])
    tl.store(lse + o_row, (b_m + tl.log2(b_sum)) * LN2, mask=m_row)


# numbers that change with the tree are not specialised on: each variant takes seconds to compile
@triton.jit(do_not_specialize=["nodes", "tree", "first_b", "first_t", "length_b", "word_b", "word_t"])
def tree_attention_kernel(
    q, k, v, p_k, p_v, first, lengths, words, sinks, out, lse, scale, cap, nodes, tree,
    q_strides, k_strides, v_strides, first_b, first_t, length_b, word_b, word_t,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, TMA: tl.constexpr, OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid [row blocks, batch x KV heads, splits]. Writes split i of out [split, batch, node, head, VALUE_DIM] and lse.

    A split that no tiles are left for writes -inf to lse, and nothing to out. OVERLAP: what comes next may begin, and wait.
    """
    batch, head, split = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS, tl.program_id(2)
    at = (batch, head)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_m < nodes * GROUPS
    o_m = tl.minimum(o_m, nodes * GROUPS - 1)  # rows there are none of repeat the last one and are not stored
    o_t, o_h = o_m // GROUPS, head * GROUPS + o_m % GROUPS

    # [BLOCK_M, BLOCK_D]
    o_d = tl.arange(0, BLOCK_D)
    p_q = q + tl.cast(batch, tl.int64) * q_strides[0] + o_h[:, None] * q_strides[1] + o_t[:, None] * q_strides[2]
    b_q = tl.load(p_q + o_d[None, :], mask=(o_d < HEAD_DIM)[None, :], other=0.0)
    b_q = b_q.to(tl.float32) if UPCAST else b_q
    p_k += tl.cast(batch, tl.int64) * k_strides[0] + tl.cast(head, tl.int64) * k_strides[1]
    p_v += tl.cast(batch, tl.int64) * v_strides[0] + tl.cast(head, tl.int64) * v_strides[1]

    # tiles 0 .. prefix - 1 end at `length`, those from `whole` on are seen by every row; `tree` tiles of nodes follow
    length = tl.load(lengths + batch * length_b)
    b_first = tl.maximum(tl.load(first + batch * first_b + o_t * first_t), 0)
    p_word = words + batch * word_b + o_t * word_t
    prefix = tl.cdiv(tl.maximum(length - tl.min(b_first, 0), 0), BLOCK_N)
    whole = prefix - tl.maximum(length - tl.max(b_first, 0), 0) // BLOCK_N
    share = tl.cdiv(prefix + tree, tl.num_programs(2))
    start, stop = split * share, tl.minimum((split + 1) * share, prefix + tree)
    origin = length - prefix * BLOCK_N

    state = begin(sinks, o_h, split, BLOCK_M, BLOCK_V, SINKS)
    for i in tl.range(start, tl.minimum(stop, whole), num_stages=1):
        o_n = origin + i * BLOCK_N + tl.arange(0, BLOCK_N)
        b_k = load_slots(p_k, origin + i * BLOCK_N, k_strides[2], o_n >= 0, HEAD_DIM, BLOCK_N, BLOCK_D, UPCAST)
        b_v = load_slots(p_v, origin + i * BLOCK_N, v_strides[2], o_n >= 0, VALUE_DIM, BLOCK_N, BLOCK_V, UPCAST)
        b_s = scores(b_q, b_k, scale, cap, SOFTCAP, PRECISION)
        b_s = tl.where(o_n[None, :] >= b_first[:, None], b_s, -float("inf"))
        state = update(state, b_s, b_v, True, PRECISION)
    for i in tl.range(tl.maximum(start, whole), tl.minimum(stop, prefix), num_stages=STAGES):
        b_k = load_tile(k, p_k, at, origin + i * BLOCK_N, k_strides[2], HEAD_DIM, BLOCK_N, BLOCK_D, TMA, UPCAST)
        b_v = load_tile(v, p_v, at, origin + i * BLOCK_N, v_strides[2], VALUE_DIM, BLOCK_N, BLOCK_V, TMA, UPCAST)
        state = update(state, scores(b_q, b_k, scale, cap, SOFTCAP, PRECISION), b_v, False, PRECISION)
    for i in tl.range(tl.maximum(start - prefix, 0), stop - prefix, num_stages=1):
        b_word = tl.load(p_word + i)  # [BLOCK_M]
        o_n = tl.arange(0, WORD)
        m_n = (tl.reduce_or(b_word, 0) >> o_n & 1) != 0  # what no row sees may hold anything, and 0 x NaN is NaN
        b_k = load_slots(p_k, length + i * WORD, k_strides[2], m_n, HEAD_DIM, WORD, BLOCK_D, UPCAST)
        b_v = load_slots(p_v, length + i * WORD, v_strides[2], m_n, VALUE_DIM, WORD, BLOCK_V, UPCAST)
        b_s = scores(b_q, b_k, scale, cap, SOFTCAP, PRECISION)
        b_s = tl.where((b_word[:, None] >> o_n[None, :] & 1) != 0, b_s, -float("inf"))
        state = update(state, b_s, b_v, True, PRECISION)

    if OVERLAP:
        gdc_launch_dependents()
    o_row = ((split * (tl.num_programs(1) // KV_HEADS) + batch) * nodes + o_t) * (KV_HEADS * GROUPS) + o_h
    store(state, out, lse, o_row, m_row, tl.where(start < stop, VALUE_DIM, 0), VALUE_DIM, BLOCK_V)


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(parts, parts_lse, out, lse, rows, splits, DIM: tl.constexpr, BLOCK_R: tl.constexpr,
                 BLOCK_DIM: tl.constexpr, BLOCK_S: tl.constexpr, MOST: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Attention over disjoint slots put together: parts [split, row, DIM] and their log-sum-exps, at most MOST of each.

    Parts go by tiles of BLOCK_S, most often one. Those whose log-sum-exp is -inf are not read: they were not written.
    """
    o_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < rows
    if OVERLAP:  # its programs begin while the last ones of attention write
        gdc_wait()
    b_m = tl.max(load_lse(parts_lse, 0, o_row, m_row, rows, splits, MOST), 0)
    b_max = tl.where(b_m == -float("inf"), 0.0, b_m)  # no part saw anything: inf - inf is NaN
    b_l, b_acc = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R, BLOCK_DIM], tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        # [BLOCK_S, BLOCK_R]
        b_weight = tl.exp2(load_lse(parts_lse, start, o_row, m_row, rows, splits, BLOCK_S) - b_max[None, :])
        # [BLOCK_S, BLOCK_R, BLOCK_DIM]
        o_part = (start + tl.arange(0, BLOCK_S))[:, None] * rows + o_row[None, :]
        o_d = tl.arange(0, BLOCK_DIM)[None, None, :]
        m_part = (b_weight > 0)[:, :, None] & (o_d < DIM)
        b_part = tl.load(parts + o_part.to(tl.int64)[:, :, None] * DIM + o_d, mask=m_part, other=0.0)
        b_acc += tl.sum(b_part * b_weight[:, :, None], 0)
        b_l += tl.sum(b_weight, 0)
    store((b_acc, b_m, b_l), out, lse, o_row, m_row, DIM, DIM, BLOCK_DIM)


@triton.jit
def load_lse(parts_lse, start, o_row, m_row, rows, splits, BLOCK_S: tl.constexpr):
    """[BLOCK_S, row]: of the splits from `start` on, in base 2; -inf where there is none."""
    o_s = start + tl.arange(0, BLOCK_S)
    m_s = (o_s < splits)[:, None] & m_row[None, :]
    return tl.load(parts_lse + o_s[:, None] * rows + o_row[None, :], mask=m_s, other=-float("inf")) * LOG2E


def tree_attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor, lengths: Tensor, ancestors: Tensor,
                   scale: float | None, softcap: float | None, sinks: Tensor | None, splits: int | None = None
                   ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch on the current device; arguments as `reference.tree_attention`, checked by the op."""
    batch, heads, nodes, head_dim = query.shape
    kv_heads, slots, value_dim = key.shape[1], key.shape[2], value.shape[3]
    groups = heads // kv_heads
    block_d, block_v = (max(64, triton.next_power_of_2(d)) for d in (head_dim, value_dim))
    device = chip()
    config = attention_config(device.arch, max(block_d, block_v), nodes * groups, query.element_size())
    words = ancestors.shape[2]
    prefix = max(slots - nodes, 0)
    splits = splits or plan.splits(
        plan.grid(config, device.processors, batch * kv_heads, nodes * groups, prefix, words)
    )

    out = query.new_empty(batch, nodes, heads, value_dim)
    lse = query.new_empty(batch, nodes, heads, dtype=torch.float32)
    parts, parts_lse = out, lse
    if splits > 1:
        parts, parts_lse = (lse.new_empty(splits, *whole.shape) for whole in (out, lse))
    scale = (head_dim**-0.5 if scale is None else scale) * LOG2E.value

    def launch(axes: tma.Axes | None) -> None:
        k, v = (x if axes is None else _descriptor(x, axes, config.block_n, block)
                for x, block in ((key, block_d), (value, block_v)))  # fmt: skip
        tree_attention_kernel[triton.cdiv(nodes * groups, config.block_m), batch * kv_heads, splits](
            query, k, v, key, value, first, lengths, ancestors, sinks, parts, parts_lse,
            2 * scale / softcap if softcap else scale, softcap * LOG2E.value if softcap else 0.0,
            nodes, words, query.stride()[:3], key.stride()[:3], value.stride()[:3],
            *first.stride(), lengths.stride(0), *ancestors.stride()[:2],
            KV_HEADS=kv_heads, GROUPS=groups, HEAD_DIM=head_dim, VALUE_DIM=value_dim,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, BLOCK_V=block_v, STAGES=config.stages,
            SOFTCAP=softcap is not None, SINKS=sinks is not None,
            TMA={None: None, tma.BY_HEAD: "by head", tma.BY_SLOT: "by slot"}[axes], OVERLAP=device.overlaps,
            PRECISION=device.precision, UPCAST=UPCAST, num_warps=config.warps, enable_fp_fusion=True,
        )  # fmt: skip

    _launch(launch, _axes(key, value) if device.tma else None)
    if splits > 1:
        rows = batch * nodes * heads
        merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            parts, parts_lse, out, lse, rows, splits, DIM=value_dim, BLOCK_R=MERGE_ROWS, BLOCK_DIM=block_v,
            BLOCK_S=MERGE_SPLITS, MOST=plan.MOST, OVERLAP=device.overlaps, num_warps=MERGE_ROWS, enable_fp_fusion=True,
            **({"launch_pdl": True} if device.overlaps else {}),
        )  # fmt: skip
    return out, lse


_refusals: list[str] = []  # of the driver, to make descriptors


def _launch(launch: Callable[[tma.Axes | None], None], axes: tma.Axes | None) -> None:
    """Launch with descriptors that take axes in this order; without any, if that is None or the driver refuses them."""
    if axes is None or _refusals:
        return launch(None)
    try:
        launch(axes)
    except RuntimeError as error:  # of the host: nothing was launched
        launch(None)
        _refusals.append(str(error))
        warnings.warn(
            f"tree_attention: no descriptors for the copy engine ({error}); keys and values are loaded without it.",
            stacklevel=2,
        )


def _axes(key: Tensor, value: Tensor) -> tma.Axes | None:
    """The order that both allow."""
    orders = {tma.axes(x.stride(), x.element_size(), x.data_ptr()) for x in (key, value)}
    return orders.pop() if len(orders) == 1 else None


def _descriptor(x: Tensor, axes: tma.Axes, slots: int, dim: int) -> TensorDescriptor:
    x = x.permute(axes)
    block = [1, slots, 1, dim] if axes == tma.BY_SLOT else [1, 1, slots, dim]
    return TensorDescriptor(x, [*x.shape], [*x.stride()], block)
