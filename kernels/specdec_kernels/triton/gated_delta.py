"""The gated delta rule over a tree: as linear attention, and 16 nodes at a time once the state is read.

First all nodes look up keys and queries in the state, while it passes through. Then come tiles of 16 nodes, in order: what the
nodes of earlier tiles have written is known, which leaves a triangular system of 16 x 16. So work beyond the state grows with
nodes squared, and registers do not.

A system (I + M) u = b is solved by the inverse, which is put together from those of blocks on the diagonal: two blocks with
inverses P and Q, and C below the first, give -Q C P. No number gets larger than in the inverses themselves. The shorter product
(I - M)(I + M^2)(I + M^4)... would not do: where keys are alike, as those of a repeated token are, powers of M grow like
binomial coefficients. In float32 1e-4 is lost by that with 16 nodes, and everything with 32.

By arithmetic, not measured: states take the time that they take `linear_attention`, 1.0 us a row for a layer of Qwen3-Next-80B
on an H200. 16 nodes are 0.06 GFLOP a row and 64 are 0.4, in three products of tf32 each: 0.4 and 2.3 us at 494 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.triton.linear_attention import (
    block,
    extent,
    load,
    load_entering,
    load_numbers,
    load_paths,
    load_state,
    of_fold,
    path_decay,
    path_weights,
    strided,
    tiles,
)  # fmt: skip

TILE: tl.constexpr = tl.constexpr(16)
DOUBLINGS: tl.constexpr = tl.constexpr(4)  # of blocks of one node, to a tile


@triton.jit
def solve(b_m, b_right, PRECISION: tl.constexpr):
    """u of (I + M) u = b, M [TILE, TILE] strictly lower triangular: what is on its diagonal is not looked at."""
    o_n = tl.arange(0, TILE)
    b_apart = o_n[:, None] ^ o_n[None, :]  # its highest bit is the size of the blocks in which i and j are neighbours
    b_inverse = tl.where(b_apart == 0, 1.0, 0.0) - tl.where(b_apart == 1, b_m, 0.0)
    for doubling in tl.range(1, DOUBLINGS, num_stages=1):
        b_below = tl.where((b_apart >> doubling) == 1, b_m, 0.0)
        b_below = tl.dot(b_inverse, b_below, input_precision=PRECISION)
        b_inverse -= tl.dot(b_below, b_inverse, input_precision=PRECISION)
    return tl.dot(b_inverse, b_right, input_precision=PRECISION)


@triton.jit
def pairs(
    query, key, decay, ancestors, at, key_at, first, nodes, i, j,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """exp(G_i - G_j) times k_i . k_j and times q_i . k_j: [TILE, TILE] each, of nodes from i and from j on."""
    o_i, o_j, o_n = i + tl.arange(0, TILE), j + tl.arange(0, TILE), tl.arange(0, BLOCK_N)
    m_i, m_j, m_n = o_i < nodes, o_j < nodes, o_n < nodes
    b_alike, b_score = tl.zeros([TILE, TILE], tl.float32), tl.zeros([TILE, TILE], tl.float32)
    for start in tl.range(0, DIM, BLOCK_K, num_stages=1):
        o_k = start + tl.arange(0, BLOCK_K)
        b_key = tl.trans(load(key, key_at, o_j, m_j, o_k, o_k < DIM))
        b_alike = tl.dot(load(key, key_at, o_i, m_i, o_k, o_k < DIM), b_key, b_alike, input_precision=PRECISION)
        b_query = load(query, key_at, o_i - first, m_i & (o_i >= first), o_k, o_k < DIM)
        b_score = tl.dot(b_query, b_key, b_score, input_precision=PRECISION)
    b_decay = load_numbers(decay, at, o_n, m_n)
    b_i = path_decay(load_paths(ancestors, at, o_i, m_i, o_n, m_n), b_decay)
    b_j = path_decay(load_paths(ancestors, at, o_j, m_j, o_n, m_n), b_decay)
    b_weight = path_weights(load_paths(ancestors, at, o_i, m_i, o_j, m_j), b_i, b_j)
    return b_alike * b_weight, b_score * b_weight


# numbers that change with the tree are not specialised on: each variant takes seconds to compile
@triton.jit(do_not_specialize=["ancestors", "first", "nodes"])
def _gated_delta_kernel(
    query, key, value, decay, beta, state, ancestors, update, out,
    kept_key, kept_value, kept_decay, path, count, steps, first, nodes,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid [blocks of value_dim, heads, batch]. Until a tile's turn comes, update holds b and out what the state gives."""
    at, key_at = (tl.program_id(2), tl.program_id(1)), (tl.program_id(2), tl.program_id(1) // GROUP)
    o_n, o_v = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_n, m_v = o_n < nodes, o_v < VALUE_DIM
    m_new = m_n & (o_n >= first)

    entering = load_entering(kept_value, kept_decay, path, count, steps, at, o_v, m_v, BLOCK_P) if FOLD else None
    b_found, b_read = tl.zeros([BLOCK_N, BLOCK_V], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
        o_k = start + tl.arange(0, BLOCK_K)
        b_state = load_state(state, kept_key, entering, at, key_at, o_k, o_k < DIM, o_v, m_v, FOLD, PRECISION)
        b_found = tl.dot(load(key, key_at, o_n, m_new, o_k, o_k < DIM), b_state, b_found, input_precision=PRECISION)
        b_query = load(query, key_at, o_n - first, m_new, o_k, o_k < DIM)
        b_read = tl.dot(b_query, b_state, b_read, input_precision=PRECISION)
    b_grown = path_decay(load_paths(ancestors, at, o_n, m_n, o_n, m_n), load_numbers(decay, at, o_n, m_n))
    b_grown = tl.exp(b_grown)[:, None]
    b_right = load(value, at, o_n - first, m_new, o_v, m_v) - b_grown * b_found
    b_right *= load_numbers(beta, at, o_n - first, m_new)[:, None]
    tl.store(block(update, at, o_n, o_v), b_right, mask=m_new[:, None] & m_v[None, :])
    tl.store(block(out, at, o_n - first, o_v), b_grown * b_read, mask=m_new[:, None] & m_v[None, :])

    # nothing is hoisted out of the loops over tiles: registers would be full of addresses
    for i in tl.range(first // TILE * TILE, nodes, TILE, num_stages=1, disable_licm=True):
        tl.debug_barrier()  # what is loaded now other warps have stored
        o_i = i + tl.arange(0, TILE)
        m_i = (o_i >= first) & (o_i < nodes)
        b_beta = load_numbers(beta, at, o_i - first, m_i)[:, None]
        b_update = load(update, at, o_i, o_i < nodes, o_v, m_v)
        b_out = load(out, at, o_i - first, m_i, o_v, m_v)
        for j in tl.range(0, i, TILE, num_stages=1, disable_licm=True):
            b_m, b_score = pairs(
                query, key, decay, ancestors, at, key_at, first, nodes, i, j, DIM, BLOCK_N, BLOCK_K, PRECISION
            )
            b_known = load(update, at, j + tl.arange(0, TILE), j + tl.arange(0, TILE) < nodes, o_v, m_v)
            b_update -= tl.dot(b_beta * b_m, b_known, input_precision=PRECISION)
            b_out = tl.dot(b_score, b_known, b_out, input_precision=PRECISION)
        b_m, b_score = pairs(
            query, key, decay, ancestors, at, key_at, first, nodes, i, i, DIM, BLOCK_N, BLOCK_K, PRECISION
        )
        # u of nodes before the first is known: beta is 0 there, and with it their rows of M
        b_update = solve(b_beta * b_m, b_update, PRECISION)
        tl.store(block(update, at, o_i, o_v), b_update, mask=m_i[:, None] & m_v[None, :])
        b_out = tl.dot(b_score, b_update, b_out, input_precision=PRECISION)
        tl.store(block(out, at, o_i - first, o_v), b_out, mask=m_i[:, None] & m_v[None, :])


def gated_delta(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor, ancestors: Tensor,
    update: Tensor, fold: Sequence[Tensor] | None,
) -> Tensor:  # fmt: skip
    """Launch on the current device; arguments as `reference.gated_delta`, checked by the op."""
    nodes, new = key.shape[1], query.shape[1]
    out = state.new_empty(value.shape)
    grid, options = tiles(state, key, fold)
    _gated_delta_kernel[grid](
        *(strided(x) for x in (query, key, value, decay, beta, state.transpose(1, 2), ancestors, update, out)),
        *of_fold(fold), nodes - new, nodes, BLOCK_N=extent(nodes), FOLD=fold is not None, **options,
    )  # fmt: skip
    return out
