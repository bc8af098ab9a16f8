"""Linear attention with decay over a tree: one program owns BLOCK_V columns of the state of one row and head.

No column of a state depends on another, so columns are shared out, and each is read once and written once, a tile of BLOCK_K
rows at a time. What a node weighs its ancestors by is a matrix of nodes x nodes, which all programs of a head work out.

By arithmetic, not measured: the states of a layer of Qwen3-Next-80B are 2.1 MB a row, so an H200 (4.3 TB/s) takes 1.0 us to
read and write them where the fold goes with the read. Where the fold is a launch of its own they are read twice: 1.5 us.

Names: b_ holds a block, o_ offsets, m_ masks; `at` is (row, head). A tensor comes as (pointer, *strides).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.backend import chip
from specdec_kernels.configs import RECURRENCE
from specdec_kernels.recurrences import MAX_NODES


@triton.jit
def block(x, at, o_n, o_d):
    """Pointers [node, channel] into one row and head of x [batch, node, head, channel]."""
    p_x = x[0] + tl.cast(at[0], tl.int64) * x[1] + tl.cast(at[1], tl.int64) * x[3]
    return p_x + o_n[:, None] * x[2] + o_d[None, :] * x[4]


@triton.jit
def load(x, at, o_n, m_n, o_d, m_d):
    """[node, channel] float32 of one row and head of x [batch, node, head, channel]; zeros where a mask says no."""
    return tl.load(block(x, at, o_n, o_d), mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_numbers(x, at, o_n, m_n):
    """[node] float32 of one row and head of x [batch, node, head]; zeros where the mask says no."""
    p_x = x[0] + tl.cast(at[0], tl.int64) * x[1] + tl.cast(at[1], tl.int64) * x[3] + o_n * x[2]
    return tl.load(p_x, mask=m_n, other=0.0).to(tl.float32)


@triton.jit
def load_paths(ancestors, at, o_i, m_i, o_j, m_j):
    """[i, j] bool: whether node j is node i or an ancestor of it."""
    p_seen = ancestors[0] + tl.cast(at[0], tl.int64) * ancestors[1]
    p_seen += o_i[:, None] * ancestors[2] + o_j[None, :] * ancestors[3]
    return tl.load(p_seen, mask=m_i[:, None] & m_j[None, :], other=0) != 0


@triton.jit
def path_decay(b_seen, b_decay):
    """G [i], by the paths [i, node] and what each node decays by [node]."""
    return tl.sum(tl.where(b_seen, b_decay[None, :], 0.0), 1)


@triton.jit
def path_weights(b_seen, b_i, b_j):
    """exp(G_i - G_j) [i, j] where j is on the path to i, else 0."""
    return tl.exp(tl.where(b_seen, b_i[:, None] - b_j[None, :], -float("inf")))


@triton.jit
def load_entering(value, decay, path, count, steps, at, o_v, m_v, BLOCK_P: tl.constexpr):
    """Of the nodes of a fold: number, mask, decay by those after each, decay by all, values [BLOCK_P, value_dim]."""
    o_p = tl.arange(0, BLOCK_P)
    m_p = o_p < tl.minimum(tl.load(count[0] + at[0] * count[1]), steps)
    o_n = tl.load(path[0] + at[0] * path[1] + o_p * path[2], mask=m_p, other=0).to(tl.int32)
    b_decay = load_numbers(decay, at, o_n, m_p)
    b_later = tl.sum(tl.where(o_p[None, :] > o_p[:, None], b_decay[None, :], 0.0), 1)
    return o_n, m_p, tl.exp(b_later), tl.exp(tl.sum(b_decay)), load(value, at, o_n, m_p, o_v, m_v)


@triton.jit
def load_state(state, key, entering, at, key_at, o_k, m_k, o_v, m_v, FOLD: tl.constexpr, PRECISION: tl.constexpr):
    """A tile [key channel, value channel] of a state; if there is a fold, as it is after that, which is stored too."""
    b_state = load(state, at, o_k, m_k, o_v, m_v)
    if FOLD:
        o_n, m_n, b_later, decay, b_value = entering
        b_key = load(key, key_at, o_n, m_n, o_k, m_k) * b_later[:, None]
        b_state = tl.dot(tl.trans(b_key), b_value, b_state * decay, input_precision=PRECISION)
        tl.store(block(state, at, o_k, o_v), b_state, mask=m_k[:, None] & m_v[None, :])
    return b_state


# numbers that change with the tree are not specialised on: each variant takes seconds to compile
@triton.jit(do_not_specialize=["ancestors", "first", "nodes"])
def _linear_attention_kernel(
    query, key, value, decay, state, ancestors, out, kept_key, kept_value, kept_decay, path, count, steps, first, nodes,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid [blocks of value_dim, heads, batch]."""
    at, key_at = (tl.program_id(2), tl.program_id(1)), (tl.program_id(2), tl.program_id(1) // GROUP)
    o_n, o_v = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_n, m_v = o_n < nodes, o_v < VALUE_DIM
    m_new = m_n & (o_n >= first)

    entering = load_entering(kept_value, kept_decay, path, count, steps, at, o_v, m_v, BLOCK_P) if FOLD else None
    b_out, b_score = tl.zeros([BLOCK_N, BLOCK_V], tl.float32), tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for start in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
        o_k = start + tl.arange(0, BLOCK_K)
        b_state = load_state(state, kept_key, entering, at, key_at, o_k, o_k < DIM, o_v, m_v, FOLD, PRECISION)
        b_query = load(query, key_at, o_n - first, m_new, o_k, o_k < DIM)
        b_key = load(key, key_at, o_n, m_n, o_k, o_k < DIM)
        b_out = tl.dot(b_query, b_state, b_out, input_precision=PRECISION)
        b_score = tl.dot(b_query, tl.trans(b_key), b_score, input_precision=PRECISION)

    b_seen = load_paths(ancestors, at, o_n, m_n, o_n, m_n)
    b_total = path_decay(b_seen, load_numbers(decay, at, o_n, m_n))
    b_score *= path_weights(b_seen, b_total, b_total)
    b_value = load(value, at, o_n, m_n, o_v, m_v)
    b_out = tl.dot(b_score, b_value, b_out * tl.exp(b_total)[:, None], input_precision=PRECISION)
    tl.store(block(out, at, o_n - first, o_v), b_out, mask=m_new[:, None] & m_v[None, :])


@triton.jit
def _fold_kernel(
    state, key, value, decay, path, count, steps,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid [blocks of value_dim, heads, batch]."""
    at, key_at = (tl.program_id(2), tl.program_id(1)), (tl.program_id(2), tl.program_id(1) // GROUP)
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    entering = load_entering(value, decay, path, count, steps, at, o_v, o_v < VALUE_DIM, BLOCK_P)
    for start in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
        o_k = start + tl.arange(0, BLOCK_K)
        load_state(state, key, entering, at, key_at, o_k, o_k < DIM, o_v, o_v < VALUE_DIM, True, PRECISION)


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, state: Tensor, ancestors: Tensor,
    fold: Sequence[Tensor] | None,
) -> Tensor:  # fmt: skip
    """Launch on the current device; arguments as `reference.linear_attention`, checked by the op."""
    nodes, new = key.shape[1], query.shape[1]
    out = state.new_empty(len(query), new, *value.shape[2:])
    grid, options = tiles(state, key, fold)
    _linear_attention_kernel[grid](
        *(strided(x) for x in (query, key, value, decay, state.transpose(1, 2), ancestors, out)), *of_fold(fold),
        nodes - new, nodes, BLOCK_N=extent(nodes), FOLD=fold is not None, **options,
    )  # fmt: skip
    return out


def fold_linear_attention(state: Tensor, *fold: Tensor) -> None:
    """Launch on the current device; arguments as `reference.fold_linear_attention`, checked by the op."""
    grid, options = tiles(state, fold[0], fold)
    _fold_kernel[grid](strided(state.transpose(1, 2)), *of_fold(fold), **options)


def tiles(state: Tensor, key: Tensor, fold: Sequence[Tensor] | None) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The grid, and how a program is tiled."""
    batch, heads, dim, value_dim = state.shape
    steps = 0 if fold is None else fold[3].shape[1]
    return (triton.cdiv(value_dim, RECURRENCE.block_v), heads, batch), {
        "GROUP": heads // key.shape[2], "DIM": dim, "VALUE_DIM": value_dim, "BLOCK_P": extent(steps),
        "BLOCK_K": RECURRENCE.block_k, "BLOCK_V": RECURRENCE.block_v, "STAGES": RECURRENCE.stages,
        "PRECISION": chip().precision, "num_warps": RECURRENCE.warps, "enable_fp_fusion": True,
    }  # fmt: skip


def extent(count: int) -> int:
    """Of a block with room for so many nodes."""
    return 16 if count <= 16 else MAX_NODES


def strided(x: Tensor) -> tuple[Any, ...]:
    """As kernels take it."""
    return x, *x.stride()


def of_fold(fold: Sequence[Tensor] | None) -> tuple[Any, ...]:
    """Key, value, decay, path, count as kernels take them, and the length of paths."""
    return (None,) * 5 + (0,) if fold is None else (*map(strided, fold), fold[3].shape[1])
