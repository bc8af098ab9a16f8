"""Sibling rejection in launches: the laws of all nodes, the weights off their children, one for each j below the width, the
walk, the mass by block, one token.

What is owed at a node once its first j children are rejected depends on no coin. So launch j works it out at all nodes at
once, from two things that launch j - 1 left: c (see `specdec_kernels.reference.verify`), and what is owed off the siblings,
by block of the vocabulary, which every program adds up in the same order and for its own row alone. It stores what the coin
of child j must be below, and reads the vocabulary for what the child's rejection leaves in turn. The walk compares coins.
Points need no vocabulary: launch 0 is enough for a tree of nothing else. Numbers of siblings are float64; the vocabulary
takes 32-bit arithmetic summed in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.reference.laws import Law
from specdec_kernels.triton.law import exponential, law

_BLOCK = 4096  # tokens a program looks at, of float64 half as many: tiles of both laws are held in registers
_SIZES = ["nodes", "internal", "width", "blocks", "depth", "coins"]  # of trees: each variant would be compiled anew
_POINT, _WITHOUT, _TOP, _PADDING = (
    tl.constexpr(int(law)) for law in (Law.POINT, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP, Law.PADDING)
)


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
    p_logits, p_draft, p_law, best, o_v, vocab, b_token, b_owed, scale, unit, temperature,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[BLOCK] owed at the tokens o_v: (p - scale w / unit)+ off the siblings, `b_owed` [WIDTH] on them."""
    mask = o_v < vocab
    b_x = tl.load(p_logits + o_v, mask=mask, other=-float("inf")).to(tl.float64 if WIDE else tl.float32)
    b_p = _law(b_x, o_v, p_law, best, temperature, GREEDY)
    if DRAFT:
        b_w = tl.load(p_draft + o_v, mask=mask, other=0.0).to(b_p.dtype)
        in_units = tl.minimum(b_w, 2 * unit.to(b_p.dtype)) / unit.to(b_p.dtype)  # siblings alone have larger weights
        b_p = tl.maximum(b_p - scale.to(b_p.dtype) * in_units, 0.0)
    return _put(b_p, o_v, b_token, b_owed, WIDTH)


@triton.jit
def _put(b_x, o_v, b_token, b_value, WIDTH: tl.constexpr):
    """[BLOCK]: x at the tokens o_v, with `b_value` [WIDTH] at the tokens `b_token` [WIDTH]."""
    o_w = tl.arange(0, WIDTH)
    for w in range(WIDTH):  # one after the other: a tile [BLOCK, WIDTH] would take all registers
        token, value = tl.sum(tl.where(o_w == w, b_token, 0)), tl.sum(tl.where(o_w == w, b_value, 0.0))
        b_x = tl.where(o_v == token.to(tl.int32), value.to(b_x.dtype), b_x)
    return b_x


@triton.jit
def _children(i_row, node, p_children, p_laws, nodes, width, WIDTH: tl.constexpr):
    """The children of a node, [WIDTH] int64, 0 where there is none; how many are tried before each, [WIDTH] int32."""
    o_w = tl.arange(0, WIDTH)
    b_index = tl.maximum(tl.load(p_children + (i_row * nodes + node) * width + o_w, mask=o_w < width, other=0), 0)
    b_index = tl.where(tl.load(p_laws + i_row * nodes + b_index) == _PADDING, 0, b_index)
    return b_index, tl.cumsum((b_index > 0).to(tl.int32), 0) - 1


@triton.jit
def _tokens(i_row, b_index, p_tokens, nodes, WIDTH: tl.constexpr):
    """[WIDTH] tokens of children, -1 and below where there is none, and whether none before it has the same (int32)."""
    o_w = tl.arange(0, WIDTH)
    b_token = tl.load(p_tokens + i_row * nodes + b_index, mask=b_index > 0, other=0)
    b_token = tl.where(b_index > 0, b_token, -1 - o_w)  # these differ, and are no tokens
    b_same = tl.where(o_w[None, :] < o_w[:, None], (b_token[:, None] == b_token[None, :]).to(tl.int32), 0)
    return b_token, tl.where(tl.max(b_same, 1) > 0, 0, (b_index > 0).to(tl.int32))


@triton.jit
def _siblings(
    i_row, node, b_index, b_rank, p_logits, p_law, p_best, p_tokens, p_laws, p_draft, p_weight,
    nodes, internal, vocab, blocks, temperature,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """[WIDTH] of a node's children: tokens, p, w where that can be taken away, weight of all that could be drawn (inf of a
    point), l. And how many of them, the first ones, were drawn, and the unit of w: the least of those weights, as a power of
    two, which divides without rounding.
    """
    o_w = tl.arange(0, WIDTH)
    at, parent = i_row * nodes + node, i_row * internal + tl.minimum(node, internal - 1)
    b_exists = (b_index > 0).to(tl.int32)
    b_token, b_first = _tokens(i_row, b_index, p_tokens, nodes, WIDTH)
    b_x = tl.load(p_logits + at * vocab + b_token, mask=b_index > 0, other=0.0).to(tl.float64)
    b_p = _law(b_x, b_token, p_law + at * 3, tl.load(p_best + at), temperature, GREEDY)
    b_p = tl.where(b_first > 0, b_p, 0.0)
    b_chance = tl.full([WIDTH], 1.0, tl.float64)
    b_own = tl.zeros([WIDTH], tl.float64)
    b_drawable = tl.full([WIDTH], float("inf"), tl.float64)
    drawn, unit = 0, tl.full((), 1.0, tl.float64)
    if DRAFT:
        kind = tl.load(p_laws + at)
        b_w = tl.load(p_draft + parent * vocab + b_token, mask=b_index > 0, other=0.0).to(tl.float64)
        b_later = tl.where(kind == _TOP, (b_rank > 0).to(tl.int32), 0)
        b_point = tl.where(kind == _POINT, 1, b_later)
        b_point = tl.where(b_exists > 0, b_point, 1)
        b_own = tl.where(b_point > 0, 0.0, tl.where(b_first > 0, b_w, 0.0))
        o_b = tl.arange(0, BLOCKS)
        others = tl.sum(tl.load(p_weight + parent * blocks + o_b, mask=o_b < blocks, other=0.0))
        b_could = tl.where((kind == _WITHOUT) & (o_w[None, :] < o_w[:, None]), 0.0, b_own[None, :])
        b_drawable = tl.where(b_point > 0, float("inf"), others + tl.sum(b_could, 1))
        b_chance = tl.where(b_point > 0, 1.0, b_w / b_drawable)
        drawn, unit = tl.sum(1 - b_point), tl.min(b_drawable)
        unit = (unit.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    b_token = tl.where(b_first > 0, b_token, -1 - o_w)
    return b_token, b_p, b_own, b_drawable, b_chance, drawn, unit


@triton.jit
def _state(rejected, p_scale, p_rest, b_rank, b_p, b_own, unit, blocks, BLOCKS: tl.constexpr):
    """What is owed once `rejected` drawn children are: after how many, c in units, on the siblings [WIDTH], elsewhere in all.

    Where nothing was left over all was accepted up to rounding, and what was owed before stays owed.
    """
    o_b, after = tl.arange(0, BLOCKS), rejected + 1
    scale = tl.full((), 0.0, tl.float64)
    b_owed, rest, total = b_p, scale, scale
    while (after > 0) & ~(total > 0):
        after -= 1
        scale = tl.load(p_scale + after - 1, mask=after > 0, other=0.0)
        b_owed = tl.where(b_rank < after, 0.0, tl.maximum(b_p - scale * (b_own / unit), 0.0))
        b_rest = tl.load(p_rest + (after - 1) * blocks + o_b, mask=o_b < tl.where(after > 0, blocks, 0), other=0.0)
        rest = tl.where(after > 0, tl.sum(b_rest), tl.maximum(1.0 - tl.sum(b_p), 0.0))
        total = rest + tl.sum(b_owed)
    return after, scale, b_owed, rest


@triton.jit(do_not_specialize=_SIZES)
def _weight_kernel(
    p_tokens, p_children, p_laws, p_draft, p_weight, nodes, internal, width, vocab, blocks,
    WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights off the children, added up by block: a difference from the whole sum would be all rounding."""
    i_row, node, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b_index, _ = _children(i_row, node, p_children, p_laws, nodes, width, WIDTH)
    b_token, _ = _tokens(i_row, b_index, p_tokens, nodes, WIDTH)
    o_v, parent = i_block * BLOCK + tl.arange(0, BLOCK), i_row * internal + node
    b_w = tl.load(p_draft + parent * vocab + o_v, mask=o_v < vocab, other=0.0).to(tl.float64 if WIDE else tl.float32)
    b_w = _put(b_w, o_v, b_token, tl.zeros([WIDTH], tl.float64), WIDTH)
    tl.store(p_weight + parent * blocks + i_block, tl.sum(b_w.to(tl.float64)))


@triton.jit(do_not_specialize=[*_SIZES, "j"])
def _reject_kernel(
    p_logits, p_law, p_best, p_tokens, p_children, p_laws, p_draft, p_weight, p_scale, p_rest, p_limit,
    nodes, internal, width, vocab, blocks, temperature, lenience, j,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """With j children rejected: what the next one's coin must be below, and of points after it; what its rejection leaves."""
    i_row, node, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b_index, b_rank = _children(i_row, node, p_children, p_laws, nodes, width, WIDTH)
    b_next = tl.where(b_rank == j, b_index, 0)
    if tl.max(b_next) > 0:
        b_token, b_p, b_own, b_drawable, b_chance, drawn, unit = _siblings(
            i_row, node, b_index, b_rank, p_logits, p_law, p_best, p_tokens, p_laws, p_draft, p_weight,
            nodes, internal, vocab, blocks, temperature, GREEDY, DRAFT, WIDTH, BLOCKS,
        )  # fmt: skip
        if j <= drawn:
            at, parent = i_row * nodes + node, i_row * internal + tl.minimum(node, internal - 1)
            p_scale, p_rest = p_scale + parent * width, p_rest + parent * width * blocks
            _, scale, b_owed, rest = _state(j, p_scale, p_rest, b_rank, b_p, b_own, unit, blocks, BLOCKS)
            # of later children points stand right: those since child j are struck out one by one; others' launches come
            b_struck = tl.where(b_rank[None, :] < b_rank[:, None], b_rank[None, :], -1) >= j
            b_total = rest + tl.sum(tl.where(b_struck, 0.0, b_owed[None, :]), 1)
            b_limit = b_owed / tl.where(b_owed > 0, b_total * lenience * b_chance, 1.0)
            tl.store(p_limit + i_row * nodes + b_index, b_limit, mask=tl.where(b_rank < j, 0, b_index) > 0)
            if j < drawn:
                scale += (rest + tl.sum(b_owed)) * (unit / tl.sum(tl.where(b_next > 0, b_drawable, 0.0)))
                b_mass = _owed(
                    p_logits + at * vocab, p_draft + parent * vocab, p_law + at * 3, tl.load(p_best + at),
                    i_block * BLOCK + tl.arange(0, BLOCK), vocab, b_token, b_p * 0, scale, unit, temperature,
                    GREEDY, DRAFT, WIDE, WIDTH,
                )  # fmt: skip
                tl.store(p_scale + j, scale)
                tl.store(p_rest + j * blocks + i_block, tl.sum(b_mass.to(tl.float64)))


@triton.jit(do_not_specialize=_SIZES)
def _walk_kernel(
    p_law, p_children, p_laws, p_limit, p_accept, p_path, p_accepted, p_node, p_invalid, nodes, width, depth, coins,
    WIDTH: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_w = tl.arange(0, WIDTH)
    node, child, accepted, invalid = i_row * 0, i_row * 0 + 1, i_row * 0 - 1, i_row * 0
    while (child > 0) & (accepted < depth):  # a tree that is deeper than it says must not write past its row
        accepted += 1
        tl.store(p_path + i_row * (depth + 1) + accepted, node)
        total = tl.load(p_law + (i_row * nodes + node) * 3 + 2)
        invalid = tl.where(total == total, invalid, 1)
        b_index, _ = _children(i_row, node, p_children, p_laws, nodes, width, WIDTH)
        b_coin = tl.load(p_accept + i_row * coins + b_index, mask=b_index > 0, other=0.0)
        b_limit = tl.load(p_limit + i_row * nodes + b_index, mask=b_index > 0, other=0.0)
        first = tl.min(tl.where(b_coin < b_limit, o_w, WIDTH))
        child = tl.sum(tl.where(o_w == first, b_index, 0))
        node = tl.where(child > 0, child, node)
    tl.store(p_node + i_row, node)
    tl.store(p_accepted + i_row, accepted)
    tl.store(p_invalid + i_row, invalid > 0)


@triton.jit
def _block_owed(
    i_row, node, o_v, p_logits, p_law, p_best, p_tokens, p_children, p_laws, p_draft, p_weight, p_scale, p_rest,
    nodes, internal, width, vocab, blocks, temperature,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """[BLOCK] owed at a node whose children are all rejected."""
    at, parent = i_row * nodes + node, i_row * internal + tl.minimum(node, internal - 1)
    b_index, b_rank = _children(i_row, node, p_children, p_laws, nodes, width, WIDTH)
    b_token, b_p, b_own, _, _, drawn, unit = _siblings(
        i_row, node, b_index, b_rank, p_logits, p_law, p_best, p_tokens, p_laws, p_draft, p_weight,
        nodes, internal, vocab, blocks, temperature, GREEDY, DRAFT, WIDTH, BLOCKS,
    )  # fmt: skip
    p_scale, p_rest = p_scale + parent * width, p_rest + parent * width * blocks
    after, scale, b_owed, _ = _state(drawn, p_scale, p_rest, b_rank, b_p, b_own, unit, blocks, BLOCKS)
    return _owed(
        p_logits + at * vocab, p_draft + parent * vocab, p_law + at * 3, tl.load(p_best + at), o_v, vocab,
        b_token, tl.where(after < drawn, b_owed, 0.0), scale, unit, temperature, GREEDY, DRAFT, WIDE, WIDTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _mass_kernel(
    p_logits, p_law, p_best, p_tokens, p_children, p_laws, p_draft, p_weight, p_scale, p_rest, p_node, p_mass,
    nodes, internal, width, vocab, blocks, temperature,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_mass = _block_owed(
        i_row, tl.load(p_node + i_row), i_block * BLOCK + tl.arange(0, BLOCK),
        p_logits, p_law, p_best, p_tokens, p_children, p_laws, p_draft, p_weight, p_scale, p_rest,
        nodes, internal, width, vocab, blocks, temperature, GREEDY, DRAFT, WIDE, WIDTH, BLOCKS,
    )  # fmt: skip
    tl.store(p_mass + i_row * blocks + i_block, tl.sum(b_mass.to(tl.float64)))


@triton.jit
def _first_beyond(b_mass, o, base, threshold, END: tl.constexpr):
    """The first entry at which the running sum exceeds the threshold; at overshoot, the last positive one; -1 if none is."""
    b_over = (base + tl.cumsum(b_mass, 0) > threshold).to(tl.int32)
    first = tl.min(tl.where(b_mass > 0, tl.where(b_over > 0, o, END), END))
    return tl.where(first < END, first, tl.max(tl.where(b_mass > 0, o, -1)))


@triton.jit(do_not_specialize=_SIZES)
def _pick_kernel(
    p_logits, p_law, p_best, p_tokens, p_children, p_laws, p_draft, p_weight, p_scale, p_rest, p_node, p_mass,
    p_emit, p_emitted, nodes, internal, width, vocab, blocks, temperature, coins,
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
        p_logits, p_law, p_best, p_tokens, p_children, p_laws, p_draft, p_weight, p_scale, p_rest,
        nodes, internal, width, vocab, blocks, temperature, GREEDY, DRAFT, WIDE, WIDTH, BLOCKS,
    ).to(tl.float64)  # fmt: skip
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
    logits, children, laws, width = logits.contiguous(), children.contiguous(), laws.contiguous(), children.shape[2]
    row_law, best = law(logits.flatten(0, 1), temperature, top_k, top_p, min_p)
    drawn, wide = draft_probs is not None, logits.dtype == torch.float64
    draft = draft_probs.contiguous() if drawn else logits  # not read where there is none
    block = min(_BLOCK // 2 if wide else _BLOCK, triton.next_power_of_2(vocab))
    internal, blocks = draft.shape[1], triton.cdiv(vocab, block)
    numbers, integers = accept.new_empty, tokens.new_empty
    # after the rejection of each child: c, and what is owed off the siblings by block
    scale, rest, weight = (numbers(batch, internal, *shape) for shape in ((width,), (width, blocks), (blocks,)))
    tokens = tokens.contiguous()
    trees = logits, row_law, best, tokens, children, laws, draft, weight, scale, rest
    shape = nodes, internal, width, vocab, blocks, temperature or 1.0
    slots, parts = triton.next_power_of_2(max(width, 1)), triton.next_power_of_2(blocks)
    flags = dict(GREEDY=temperature == 0, DRAFT=drawn, WIDE=wide, WIDTH=slots, BLOCK=block, BLOCKS=parts)
    flags |= dict(num_warps=8, enable_fp_fusion=True)
    limit, mass = numbers(batch, nodes), numbers(batch, blocks)
    path, invalid = tokens.new_zeros(batch, depth + 1), tokens.new_empty(batch, dtype=torch.bool)
    accepted, node, emitted = integers(batch), integers(batch), integers(batch)
    if drawn and width:
        wide_draft = draft.dtype == torch.float64
        _weight_kernel[(batch, internal, blocks)](
            tokens, children, laws, draft, weight, nodes, internal, width, vocab, blocks,
            WIDE=wide_draft, WIDTH=slots, BLOCK=block, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    for j in range(width if drawn else min(width, 1)):
        grid = batch, internal if j > 0 else nodes, blocks if drawn else 1  # any node may have points for children
        _reject_kernel[grid](*trees, limit, *shape, lenience, j, **flags)
    _walk_kernel[(batch,)](
        row_law, children, laws, limit, accept, path, accepted, node, invalid,
        nodes, width, depth, accept.stride(0), WIDTH=slots, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    _mass_kernel[(batch, blocks)](*trees, node, mass, *shape, **flags)
    _pick_kernel[(batch,)](*trees, node, mass, emit, emitted, *shape, emit.stride(0), **flags)
    return path, accepted, emitted, invalid
