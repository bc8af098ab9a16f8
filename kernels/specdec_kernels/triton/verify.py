"""Sibling rejection in four launches: the laws of all nodes, the walk, the mass owed by block, and one token out of a block.

The walk is one program per row. Numbers of siblings are float64 and held in registers; it reads the vocabulary only
where c grows (see `specdec_kernels.reference.verify`), in 32-bit arithmetic summed in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.backend import chip
from specdec_kernels.reference.verify import PADDING, POINT, SAMPLED_THEN_TOP, WITHOUT_REPLACEMENT
from specdec_kernels.triton.law import exponential, law

_POINT, _WITHOUT, _TOP, _PADDING = map(tl.constexpr, (POINT, WITHOUT_REPLACEMENT, SAMPLED_THEN_TOP, PADDING))


@triton.jit
def _law(b_x, o_v, p_law, best, temperature, GREEDY: tl.constexpr):
    """p at the tokens o_v, whose logits are b_x."""
    if GREEDY:
        return tl.where(o_v == best, 1.0, 0.0).to(b_x.dtype)
    else:
        peak, cut, total = tl.load(p_law), tl.load(p_law + 1), tl.load(p_law + 2)
        return exponential(b_x, peak, cut, temperature) / total.to(b_x.dtype)


@triton.jit
def _owed(
    p_logits, p_draft, p_law, best, o_v, vocab, b_token, b_owed, scale, temperature,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[BLOCK] float64 owed at the tokens o_v: (p - scale w)+ off the siblings, `b_owed` on them."""
    mask = o_v < vocab
    b_x = tl.load(p_logits + o_v, mask=mask, other=-float("inf")).to(tl.float64 if WIDE else tl.float32)
    b_p = _law(b_x, o_v, p_law, best, temperature, GREEDY)
    if DRAFT:
        b_w = tl.load(p_draft + o_v, mask=mask, other=0.0).to(b_p.dtype)
        b_p = tl.maximum(b_p - scale.to(b_p.dtype) * b_w, 0.0)
    b_same = o_v[:, None] == b_token[None, :]  # [BLOCK, WIDTH]
    b_sibling = tl.sum(tl.where(b_same, b_owed[None, :], 0.0), 1)
    return tl.where(tl.max(b_same.to(tl.int32), 1) > 0, b_sibling, b_p.to(tl.float64))


@triton.jit
def _walk_kernel(
    p_logits, p_law, p_best, p_tokens, p_children, p_laws, p_draft, p_weight, p_accept,
    p_path, p_accepted, p_node, p_scale, p_token, p_owed, p_invalid,
    nodes, internal, width, depth, vocab, coins, temperature, lenience,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_w = tl.arange(0, WIDTH)
    p_tokens, p_laws, p_accept = p_tokens + i_row * nodes, p_laws + i_row * nodes, p_accept + i_row * coins
    node, child = i_row * 0, i_row * 0 + 1
    accepted, invalid = i_row * 0, i_row * 0
    while child > 0:
        # the node's law
        p_row, p_stats = p_logits + (i_row * nodes + node) * vocab, p_law + (i_row * nodes + node) * 3
        best, total = tl.load(p_best + i_row * nodes + node), tl.load(p_stats + 2)
        invalid = tl.where(total == total, invalid, 1)
        # its children, [WIDTH]: which there are, their tokens, and what is owed at each
        b_index = tl.load(p_children + (i_row * nodes + node) * width + o_w, mask=o_w < width, other=0)
        b_index = tl.maximum(b_index, 0)
        b_exists = tl.where(tl.load(p_laws + b_index) == _PADDING, 0, (b_index > 0).to(tl.int32))
        b_token = tl.where(b_exists > 0, tl.load(p_tokens + b_index), -1 - o_w)  # -1 - o_w: differ, and are no tokens
        b_same = tl.where(o_w[None, :] < o_w[:, None], (b_token[:, None] == b_token[None, :]).to(tl.int32), 0)
        b_first = tl.where(tl.max(b_same, 1) > 0, 0, b_exists)
        b_x = tl.load(p_row + b_token, mask=b_exists > 0, other=0.0).to(tl.float64)
        b_owed = tl.where(b_first > 0, _law(b_x, b_token, p_stats, best, temperature, GREEDY), 0.0)
        rest = tl.maximum(1.0 - tl.sum(b_owed), 0.0)
        owed = rest + tl.sum(b_owed)
        # how they were drawn, [WIDTH]: own weight where that can be taken away, weight of all that could be drawn
        b_chance = tl.full([WIDTH], 1.0, tl.float64)
        b_own = tl.zeros([WIDTH], tl.float64)
        b_drawable = tl.full([WIDTH], float("inf"), tl.float64)
        scale = rest * 0
        if DRAFT:
            kind, parent = tl.load(p_laws + node), i_row * internal + tl.minimum(node, internal - 1)
            p_weights = p_draft + parent * vocab
            b_w = tl.load(p_weights + b_token, mask=b_exists > 0, other=0.0).to(tl.float64)
            b_later = tl.where(kind == _TOP, (tl.cumsum(b_exists, 0) > 1).to(tl.int32), 0)
            b_point = tl.where(kind == _POINT, 1, b_later)
            b_own = tl.where(b_point > 0, 0.0, tl.where(b_first > 0, b_w, 0.0))
            b_top = tl.where(b_later > 0, tl.where(b_first > 0, b_w, 0.0), 0.0)
            b_earlier = tl.where(kind == _WITHOUT, tl.cumsum(b_own, 0) - b_own, 0.0)
            b_left = tl.load(p_weight + parent) - tl.sum(b_top) - b_earlier
            b_drawable = tl.where(b_point > 0, float("inf"), b_left)
            b_chance = tl.where(b_point > 0, 1.0, b_w / b_left)
        # try them in their order
        child = i_row * 0
        for j in range(width):
            b_j = o_w == j
            index = tl.sum(tl.where(b_j, b_index, 0))
            if (tl.sum(tl.where(b_j, b_exists, 0)) > 0) & (child == 0):
                ratio = tl.sum(tl.where(b_j, b_owed, 0.0)) / owed / (lenience * tl.sum(tl.where(b_j, b_chance, 0.0)))
                if tl.load(p_accept + index) < ratio:
                    child = index
                else:
                    growth = owed / tl.sum(tl.where(b_j, b_drawable, 0.0))
                    b_next = tl.where(b_j, 0.0, tl.maximum(b_owed - growth * b_own, 0.0))
                    next_rest = rest
                    if DRAFT:  # noqa: SIM102  the first is decided when compiled
                        if growth > 0:
                            b_rest = tl.zeros([BLOCK], tl.float64)
                            for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
                                b_rest += _owed(
                                    p_row, p_weights, p_stats, best, start + tl.arange(0, BLOCK), vocab, b_token,
                                    b_own * 0, scale + growth, temperature, GREEDY, DRAFT, WIDE,
                                )  # fmt: skip
                            next_rest = tl.sum(b_rest)
                    next_owed = next_rest + tl.sum(b_next)
                    if next_owed > 0:  # else it was all accepted up to rounding, and stays owed
                        b_owed, rest, owed, scale = b_next, next_rest, next_owed, scale + growth
        tl.store(p_path + i_row * (depth + 1) + accepted, node)
        if child > 0:
            node = child
            accepted += 1
        else:
            tl.store(p_token + i_row * WIDTH + o_w, b_token)
            tl.store(p_owed + i_row * WIDTH + o_w, b_owed)
            tl.store(p_scale + i_row, scale)
    tl.store(p_node + i_row, node)
    tl.store(p_accepted + i_row, accepted)
    tl.store(p_invalid + i_row, invalid > 0)


@triton.jit
def _block_owed(
    i_row, node, o_v, p_logits, p_law, p_best, p_draft, p_scale, p_token, p_owed, nodes, internal, vocab, temperature,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[BLOCK] float64 owed where the walk of a row ended."""
    o_w = tl.arange(0, WIDTH)
    b_token = tl.load(p_token + i_row * WIDTH + o_w)  # [WIDTH]
    b_owed = tl.load(p_owed + i_row * WIDTH + o_w)  # [WIDTH]
    at, parent = i_row * nodes + node, i_row * internal + tl.minimum(node, internal - 1)
    return _owed(
        p_logits + at * vocab, p_draft + parent * vocab, p_law + at * 3, tl.load(p_best + at), o_v, vocab, b_token, b_owed,
        tl.load(p_scale + i_row), temperature, GREEDY, DRAFT, WIDE,
    )  # fmt: skip


@triton.jit
def _mass_kernel(
    p_logits, p_law, p_best, p_draft, p_node, p_scale, p_token, p_owed, p_mass, nodes, internal, vocab, temperature,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_mass = _block_owed(
        i_row, tl.load(p_node + i_row), i_block * BLOCK + tl.arange(0, BLOCK),
        p_logits, p_law, p_best, p_draft, p_scale, p_token, p_owed, nodes, internal, vocab, temperature,
        GREEDY, DRAFT, WIDE, WIDTH,
    )  # fmt: skip
    tl.store(p_mass + i_row * tl.num_programs(1) + i_block, tl.sum(b_mass))


@triton.jit
def _first_beyond(b_mass, o, base, threshold, END: tl.constexpr):
    """The first entry at which the running sum exceeds the threshold; at overshoot, the last positive one; -1 if none is."""
    b_over = (base + tl.cumsum(b_mass, 0) > threshold).to(tl.int32)
    first = tl.min(tl.where(b_mass > 0, tl.where(b_over > 0, o, END), END))
    return tl.where(first < END, first, tl.max(tl.where(b_mass > 0, o, -1)))


@triton.jit
def _pick_kernel(
    p_logits, p_law, p_best, p_draft, p_node, p_scale, p_token, p_owed, p_mass, p_emit, p_emitted,
    nodes, internal, vocab, blocks, coins, temperature,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    node = tl.load(p_node + i_row)
    o_b, o_v = tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    b_mass = tl.load(p_mass + i_row * blocks + o_b, mask=o_b < blocks, other=0.0)  # [BLOCKS]
    threshold = tl.load(p_emit + i_row * coins + node) * tl.sum(b_mass)
    block = tl.maximum(_first_beyond(b_mass, o_b, 0.0, threshold, BLOCKS), 0)
    base = tl.sum(tl.where(o_b < block, b_mass, 0.0))
    b_mass = _block_owed(
        i_row, node, block * BLOCK + o_v,
        p_logits, p_law, p_best, p_draft, p_scale, p_token, p_owed, nodes, internal, vocab, temperature,
        GREEDY, DRAFT, WIDE, WIDTH,
    )  # fmt: skip
    token = block * BLOCK + _first_beyond(b_mass, o_v, base, threshold, BLOCK)
    best = tl.load(p_best + i_row * nodes + node)
    nothing = tl.max(b_mass) <= 0  # all that was owed was accepted up to rounding
    tl.store(p_emitted + i_row, tl.where(nothing, best, token.to(tl.int64)))


def verify(
    logits: Tensor, tokens: Tensor, children: Tensor, laws: Tensor, draft_probs: Tensor | None,
    accept: Tensor, emit: Tensor, depth: int,
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, lenience: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, nodes, vocab = logits.shape
    logits, width = logits.contiguous(), children.shape[2]
    row_law, best = law(logits.flatten(0, 1), temperature, top_k, top_p, min_p)
    draft = logits if draft_probs is None else draft_probs.contiguous()  # not read where there is none
    weight = row_law if draft_probs is None else draft.sum(-1, dtype=torch.float64)
    slots = triton.next_power_of_2(max(width, 1))
    block = min(16384 // max(slots, 4), triton.next_power_of_2(vocab))  # tiles [block, slots] are held in registers
    blocks = triton.cdiv(vocab, block)
    integers, numbers = tokens.new_empty, accept.new_empty
    path, accepted, node, emitted = (
        tokens.new_zeros(batch, depth + 1),
        integers(batch),
        integers(batch),
        integers(batch),
    )
    end = numbers(batch), integers(batch, slots), numbers(batch, slots)  # scale, siblings' tokens, what is owed on them
    mass, invalid = numbers(batch, blocks), tokens.new_empty(batch, dtype=torch.bool)
    flags = dict(
        GREEDY=temperature == 0, DRAFT=draft_probs is not None, WIDE=logits.dtype == torch.float64, WIDTH=slots
    )
    shape, temperature = (nodes, draft.shape[1], vocab), temperature or 1.0
    stages = 1 if chip().arch == "gfx942" else 4  # what is on its way takes registers there, and all are taken
    _walk_kernel[(batch,)](
        logits, row_law, best, tokens.contiguous(), children.contiguous(), laws.contiguous(), draft, weight,
        accept, path, accepted, node, *end, invalid,
        *shape[:2], width, depth, vocab, accept.stride(0), temperature, lenience,
        **flags, BLOCK=max(block // 4, 16), STAGES=stages, num_warps=16, enable_fp_fusion=True,
    )  # fmt: skip
    _mass_kernel[(batch, blocks)](
        logits,
        row_law,
        best,
        draft,
        node,
        *end,
        mass,
        *shape,
        temperature,
        **flags,
        BLOCK=block,
        num_warps=8,
        enable_fp_fusion=True,
    )
    _pick_kernel[(batch,)](
        logits, row_law, best, draft, node, *end, mass, emit, emitted, *shape, blocks, emit.stride(0), temperature,
        **flags, BLOCK=block, BLOCKS=triton.next_power_of_2(blocks), num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return path, accepted, emitted, invalid
