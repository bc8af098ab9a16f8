"""Sibling rejection in launches: the numbers of all laws, one for each child that may have been drawn, the walk with its token.

What is owed at a node once its first j children are rejected depends on the coins of those alone. So launch j decides on
child j at all nodes at once, from two things that launch j - 1 left where it rejected: c (see
`specdec_kernels.reference.verify`), and what is owed off the siblings, by block of the vocabulary, which every program adds up
in the same order and for its own row alone. Where child j is rejected in turn, the launch reads the vocabulary for what that
leaves. Points need no vocabulary: launch 0 decides on all of them, as it does at temperature 0, where children are accepted
that are the most probable token. The walk follows what was accepted. Numbers of siblings are float64; the vocabulary takes
32-bit arithmetic summed in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.reference.laws import Law
from specdec_kernels.triton.filters import Filters
from specdec_kernels.triton.tiles import Tiles, exponential, merged, rate, read_tile, summed, tile_numbers, warmth

_BLOCK = 4096  # tokens a program looks at, of float64 half as many: tiles of both laws are held in registers
_SIZES = [
    "nodes",
    "internal",
    "width",
    "blocks",
    "parts",
    "tiles",
    "depth",
    "coins",
]  # each variant would be compiled anew
_POINT, _WITHOUT, _TOP, _PADDING = (
    tl.constexpr(int(law)) for law in (Law.POINT, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP, Law.PADDING)
)
_LITTLE = tl.constexpr(2.0**-64)  # a unit of weights whose inverse is far from infinite


@triton.jit
def _owed(
    p_logits, p_draft, peak, cut, total, i_block, vocab, b_token, b_owed, scale, unit, temperature,
    DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[BLOCK] owed at the tokens of a block: (p - scale w / unit)+ off the siblings, `b_owed` [WIDTH] on them."""
    o_v = i_block * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_logits + o_v, mask=o_v < vocab, other=-float("inf")).to(tl.float64 if WIDE else tl.float32)
    b_p = exponential(b_x, peak, cut, rate(temperature, WIDE)) * (1 / total).to(b_x.dtype)
    if DRAFT:
        up = tl.where(unit < _LITTLE, 1 / _LITTLE, 1.0)  # a power of two, as is the unit: neither product rounds
        b_w = tl.load(p_draft + o_v, mask=o_v < vocab, other=0.0).to(b_p.dtype)
        b_w = tl.minimum(b_w, 2 * unit.to(b_p.dtype)) * up.to(b_p.dtype)  # siblings alone have larger weights
        b_p = tl.maximum(b_p - (scale / unit / up).to(b_p.dtype) * b_w, 0.0)
    return _put(b_p, o_v, b_token, b_token // BLOCK == i_block, b_owed, WIDTH)


@triton.jit
def _put(b_x, o_v, b_token, b_here, b_value, WIDTH: tl.constexpr):
    """[BLOCK]: x at the tokens o_v, with `b_value` [WIDTH] at the tokens `b_token` [WIDTH] that are `b_here` [WIDTH]."""
    o_w = tl.arange(0, WIDTH)
    for w in range(WIDTH):  # one after the other: a tile [BLOCK, WIDTH] would take all registers
        token = tl.max(tl.where((o_w == w) & b_here, b_token, -1))
        if token >= 0:
            value = tl.sum(tl.where(o_w == w, b_value, 0.0))
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
    i_row, node, b_index, b_rank, p_logits, peak, cut, total, best, p_tokens, p_laws, p_draft, p_weight,
    nodes, internal, vocab, tiles, temperature,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """[WIDTH] of a node's children: tokens, p, w where that can be taken away, weight of all that could be drawn (inf of a
    point), l. And how many of them, the first ones, were drawn, and the unit of w: the least of those weights, as a power of
    two, which divides without rounding.
    """
    o_w = tl.arange(0, WIDTH)
    at, parent = i_row * nodes + node, i_row * internal + tl.minimum(node, internal - 1)
    b_exists = (b_index > 0).to(tl.int32)
    b_token, b_first = _tokens(i_row, b_index, p_tokens, nodes, WIDTH)
    if GREEDY:
        b_p = tl.where(b_token == best, 1.0, 0.0).to(tl.float64)
    else:
        b_x = tl.load(p_logits + at * vocab + b_token, mask=b_index > 0, other=0.0).to(tl.float64)
        b_p = exponential(b_x, peak, cut, rate(temperature, True)) / total
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
        o_t = tl.arange(0, TILES)
        others = tl.sum(tl.load(p_weight + parent * tiles + o_t, mask=o_t < tiles, other=0.0))
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
def _begin_kernel(
    p_logits, p_part, p_first, p_arrived, p_bins, p_tokens, p_children, p_laws, p_draft, p_weight,
    nodes, internal, width, vocab, tiles, temperature,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, DRAFT_WIDE: tl.constexpr, BINS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """The numbers of every node's law by tile, and the weights off its children, added up by tile: a difference from the whole
    sum would be all rounding.
    """
    i_row, node, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    tile_numbers(
        p_logits, p_part, p_first, p_arrived, p_bins, i_row * nodes + node, i_tile, vocab, tiles, temperature,
        GREEDY, WIDE, BINS, BLOCK, LINE,
    )  # fmt: skip
    if DRAFT and node < internal:
        parent = i_row * internal + node
        b_index, _ = _children(i_row, node, p_children, p_laws, nodes, width, WIDTH)
        b_token, _ = _tokens(i_row, b_index, p_tokens, nodes, WIDTH)
        o_v, b_w = read_tile(p_draft, parent, i_tile, vocab, tiles, BLOCK, LINE)
        b_w = tl.where(o_v < vocab, b_w.to(tl.float64 if DRAFT_WIDE else tl.float32), 0.0)
        b_here = (b_token >= 0) & (b_token // LINE % tiles == i_tile)
        b_w = _put(b_w, o_v, b_token, b_here, tl.zeros([WIDTH], tl.float64), WIDTH)
        tl.store(p_weight + parent * tiles + i_tile, summed(b_w, BLOCK))


@triton.jit(do_not_specialize=[*_SIZES, "j"])
def _reject_kernel(
    p_logits, p_part, p_first, p_tokens, p_children, p_laws, p_draft, p_weight, p_scale, p_rest, p_next, p_accept,
    nodes, internal, width, vocab, blocks, parts, tiles, temperature, coins, lenience, j,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """With j children rejected: whether the next one is accepted, or a point after it; else what its rejection leaves.

    `p_next` [batch, node] int64 is the accepted child, 0 where there is none yet, -1 where the logits are no law.
    """
    i_row, node, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    at, parent = i_row * nodes + node, i_row * internal + tl.minimum(node, internal - 1)
    b_index, b_rank = _children(i_row, node, p_children, p_laws, nodes, width, WIDTH)
    b_next = tl.where(b_rank == j, b_index, 0)
    settled = tl.load(p_next + at, mask=j > 0, other=0)
    if (settled == 0) & ((tl.max(b_next) > 0) | (i_block + j == 0)):
        peak, cut, total, best = merged(p_part, p_first, at, parts, temperature, GREEDY, PARTS)
        b_token, b_p, b_own, b_drawable, b_chance, drawn, unit = _siblings(
            i_row, node, b_index, b_rank, p_logits, peak, cut, total, best, p_tokens, p_laws, p_draft, p_weight,
            nodes, internal, vocab, tiles, temperature, GREEDY, DRAFT, WIDTH, TILES,
        )  # fmt: skip
        if j <= drawn:
            p_scale, p_rest = p_scale + parent * width, p_rest + parent * width * blocks
            _, scale, b_owed, rest = _state(j, p_scale, p_rest, b_rank, b_p, b_own, unit, blocks, BLOCKS)
            # points are struck out one by one since child j
            b_struck = tl.where(b_rank[None, :] < b_rank[:, None], b_rank[None, :], -1) >= j
            b_total = rest + tl.sum(tl.where(b_struck, 0.0, b_owed[None, :]), 1)
            b_limit = b_owed / tl.where(b_owed > 0, b_total * lenience * b_chance, 1.0)
            b_tried = tl.where(b_rank < tl.where(j < drawn, j + 1, WIDTH), tl.where(b_rank < j, 0, b_index), 0)
            b_coin = tl.load(p_accept + i_row * coins + b_index, mask=b_tried > 0, other=1.0)
            o_w = tl.arange(0, WIDTH)
            first = tl.min(tl.where((b_tried > 0) & (b_coin < b_limit), o_w, WIDTH))
            child = tl.sum(tl.where(o_w == first, b_index, 0))
            tl.store(p_next + at, tl.where(total == total, child, -1), mask=i_block == 0)
            if DRAFT and (j < drawn) & (child == 0):
                scale += (rest + tl.sum(b_owed)) * (unit / tl.sum(tl.where(b_next > 0, b_drawable, 0.0)))
                b_mass = _owed(
                    p_logits + at * vocab, p_draft + parent * vocab, peak, cut, total, i_block, vocab,
                    b_token, b_p * 0, scale, unit, temperature, DRAFT, WIDE, WIDTH, BLOCK,
                )  # fmt: skip
                tl.store(p_scale + j, scale)
                tl.store(p_rest + j * blocks + i_block, summed(b_mass, BLOCK))


@triton.jit
def _walk(p_next, p_path, p_accepted, p_invalid, i_row, nodes, depth, writes):
    """The last accepted node; `writes` says whether this program stores the way there."""
    node, accepted = i_row * 0, i_row * 0
    p_next, p_path = p_next + i_row * nodes, p_path + i_row * (depth + 1)
    child = tl.load(p_next)
    tl.store(p_path, node, mask=writes)
    while (child > 0) & (accepted < depth):  # a tree that is deeper than it says must not write past its row
        node, accepted = child, accepted + 1
        tl.store(p_path + accepted, node, mask=writes)
        child = tl.load(p_next + node)
    for unused in range(accepted + 1, depth + 1):
        tl.store(p_path + unused, i_row * 0, mask=writes)
    tl.store(p_accepted + i_row, accepted, mask=writes)
    tl.store(p_invalid + i_row, child < 0, mask=writes)
    return node


@triton.jit
def _first_beyond(b_mass, o, base, threshold, END: tl.constexpr):
    """The first entry at which the running sum exceeds the threshold; at overshoot, the last positive one; -1 if none is."""
    b_over = (base + tl.cumsum(b_mass, 0) > threshold).to(tl.int32)
    first = tl.min(tl.where(b_mass > 0, tl.where(b_over > 0, o, END), END))
    return tl.where(first < END, first, tl.max(tl.where(b_mass > 0, o, -1)))


@triton.jit
def _drawn(
    p_logits, p_draft, peak, cut, total, best, vocab, b_token, b_owed, scale, unit, temperature, p_mass, blocks, coin,
    DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The token at which the running sum of what is owed exceeds the coin's share of it; its masses by block are there."""
    o_b = tl.arange(0, BLOCKS)
    b_mass = tl.load(p_mass + o_b, mask=o_b < blocks, other=0.0)  # [BLOCKS]
    threshold = coin * tl.sum(b_mass)
    block = tl.maximum(_first_beyond(b_mass, o_b, 0.0, threshold, BLOCKS), 0)
    base = tl.sum(tl.where(o_b < block, b_mass, 0.0))
    b_owed = _owed(
        p_logits, p_draft, peak, cut, total, block, vocab, b_token, b_owed, scale, unit, temperature,
        DRAFT, WIDE, WIDTH, BLOCK,
    ).to(tl.float64)  # fmt: skip
    token = block * BLOCK + _first_beyond(b_owed, tl.arange(0, BLOCK), base, threshold, BLOCK)
    # where nothing is owed, all that was owed was accepted up to rounding
    return tl.where(tl.max(b_owed) > 0, token.to(tl.int64), best)


@triton.jit(do_not_specialize=_SIZES)
def _emit_kernel(
    p_logits, p_part, p_first, p_tokens, p_children, p_laws, p_draft, p_weight, p_scale, p_rest, p_next, p_emit,
    p_arrived, p_mass, p_path, p_accepted, p_token, p_invalid,
    nodes, internal, width, vocab, blocks, parts, tiles, temperature, coins, depth,
    GREEDY: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The walk, and the mass that is owed after it by block. The program that ends last draws a token of a row."""
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    node = _walk(p_next, p_path, p_accepted, p_invalid, i_row, nodes, depth, i_block == 0)
    at, parent = i_row * nodes + node, i_row * internal + tl.minimum(node, internal - 1)
    peak, cut, total, best = merged(p_part, p_first, at, parts, temperature, GREEDY, PARTS)
    if GREEDY:
        tl.store(p_token + i_row, best)
    else:
        b_index, b_rank = _children(i_row, node, p_children, p_laws, nodes, width, WIDTH)
        b_token, b_p, b_own, _, _, drawn, unit = _siblings(
            i_row, node, b_index, b_rank, p_logits, peak, cut, total, best, p_tokens, p_laws, p_draft, p_weight,
            nodes, internal, vocab, tiles, temperature, GREEDY, DRAFT, WIDTH, TILES,
        )  # fmt: skip
        p_scale, p_rest = p_scale + parent * width, p_rest + parent * width * blocks
        after, scale, b_owed, _ = _state(drawn, p_scale, p_rest, b_rank, b_p, b_own, unit, blocks, BLOCKS)
        b_owed = tl.where(after < drawn, b_owed, 0.0)
        p_logits, p_draft = p_logits + at * vocab, p_draft + parent * vocab
        b_mass = _owed(
            p_logits, p_draft, peak, cut, total, i_block, vocab, b_token, b_owed, scale, unit, temperature,
            DRAFT, WIDE, WIDTH, BLOCK,
        )  # fmt: skip
        tl.store(p_mass + i_row * blocks + i_block, summed(b_mass, BLOCK))
        tl.debug_barrier()
        if tl.atomic_add(p_arrived + i_row, 1) == blocks - 1:
            token = _drawn(
                p_logits, p_draft, peak, cut, total, best, vocab, b_token, b_owed, scale, unit, temperature,
                p_mass + i_row * blocks, blocks, tl.load(p_emit + i_row * coins + node),
                DRAFT, WIDE, WIDTH, BLOCK, BLOCKS,
            )  # fmt: skip
            tl.store(p_token + i_row, token)


def verify(
    logits: Tensor, tokens: Tensor, children: Tensor, laws: Tensor, draft_probs: Tensor | None,
    accept: Tensor, emit: Tensor, depth: int,
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, lenience: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, nodes, vocab = logits.shape
    logits, tokens, children, laws = (x.contiguous() for x in (logits, tokens, children, laws))
    width, heat, wide, greedy = children.shape[2], warmth(temperature), logits.dtype == torch.float64, temperature == 0
    drawn = draft_probs is not None and not greedy
    draft = draft_probs.contiguous() if draft_probs is not None and drawn else logits  # else it is not read
    tiles, filters = Tiles.of(logits), Filters.of(vocab, temperature, top_k, top_p, min_p)
    bins = filters.bins if filters else 0
    part = tiles.numbers(logits, batch * nodes, bins)
    block = min(_BLOCK // 2 if wide else _BLOCK, max(triton.next_power_of_2(vocab), 16))
    internal, blocks = draft.shape[1], triton.cdiv(vocab, block)
    numbers, integers = accept.new_empty, tokens.new_empty
    # after the rejection of each child: c, and what is owed off the siblings by block
    scale, rest = (numbers(batch, internal, *shape) for shape in ((width,), (width, blocks)))
    weight, mass = numbers(batch, internal, tiles.count), numbers(batch, blocks)
    following, path, invalid = integers(batch, nodes), integers(batch, depth + 1), integers(batch, dtype=torch.bool)
    accepted, token = integers(batch), integers(batch)
    flags = dict(GREEDY=greedy, DRAFT=drawn, WIDE=wide, WIDTH=triton.next_power_of_2(max(width, 1)))
    _begin_kernel[(batch, nodes, tiles.count)](
        logits, *part, tokens, children, laws, draft, weight, nodes, internal, width, vocab, tiles.count, heat,
        DRAFT_WIDE=draft.dtype == torch.float64, BINS=bins, **flags, **tiles.flags,
    )  # fmt: skip
    if filters:
        part = filters.narrow(logits.flatten(0, 1), tiles, part)
    parts = part.part.shape[1]
    trees = logits, part.part, part.first, tokens, children, laws, draft, weight, scale, rest, following
    shape = nodes, internal, width, vocab, blocks, parts, tiles.count, heat
    flags |= dict(BLOCK=block, BLOCKS=triton.next_power_of_2(blocks), TILES=triton.next_power_of_2(tiles.count))
    flags |= dict(**part.flags, num_warps=8, enable_fp_fusion=True)
    for j in range(max(width, 1) if drawn else 1):
        grid = batch, internal if j > 0 else nodes, blocks if drawn else 1  # any node may have points for children
        _reject_kernel[grid](*trees, accept, *shape, accept.stride(0), lenience, j, **flags)
    _emit_kernel[(batch, 1 if greedy else blocks)](
        *trees, emit, part.arrived, mass, path, accepted, token, invalid, *shape, emit.stride(0), depth, **flags
    )
    return path, accepted, token, invalid
