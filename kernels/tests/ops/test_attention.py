"""Attention of a few nodes: the kernel for CPUs against float64, whatever the bias hides and however tensors lie."""

from typing import Any

import pytest
import torch
from cpu_variants import with_fewer_registers
from torch import Tensor

from specdec_kernels import attention
from specdec_kernels.reference.tree_attention import biased_attention as reference

EPSILON = 2.0**-24  # of float32: a sum of n products is off by less than n times this and its absolute terms
EXP = 4  # that the exponential may be off, in units of EPSILON, and the division by the sum of weights
RATIO = 4 * EXP * EPSILON  # of two weights, each rounded three times more


def draw(heads, kv_heads, dim, nodes, slots, batch=1, value_dim=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Caches as they lie: [batch, slot, head, dim] seen as [batch, head, slot, dim]. Texts of all lengths, and gaps in them."""
    query = torch.randn(batch, nodes, heads, dim).transpose(1, 2)
    key, value = (torch.randn(batch, slots, kv_heads, size).transpose(1, 2) for size in (dim, value_dim or dim))
    hidden = torch.rand(batch, 1, nodes, slots) < 0.2
    hidden |= torch.arange(slots) >= torch.randint(1, slots + 1, (batch, 1, 1, 1))
    hidden[..., 0] = False
    return query, key, value, torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def near(found, query, key, value, bias):
    """Scores off by d make weights off by 2 d: in themselves, and in what they are divided by."""
    query, key, value, bias = (x.double() for x in (query, key, value, bias))
    scores = query.abs() @ key.abs().repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
    largest = scores.amax(3).transpose(1, 2)[..., None] * query.shape[3] ** -0.5
    roundings = 2 * (query.shape[3] + 2) * largest + key.shape[2] + EXP
    off = (found - reference(query, key, value, bias)).abs()
    return bool((off <= EPSILON * roundings * reference(query, key, value.abs(), bias)).all())


SHAPES = [
    (4, 2, 64, 5, 261),
    (4, 4, 32, 3, 64),  # one query head to a key head
    (8, 1, 16, 5, 65),  # one key head: three packs of queries
    (2, 1, 64, 1, 7),
    (6, 2, 48, 24, 130),  # dims that are not fours of vectors
    (3, 3, 20, 2, 9, 3, 16),  # keys that are not whole vectors, and of another size than values
    (4, 2, 80, 7, 200, 4),
    (1, 1, 16, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_is_right(shape, threads):
    before, drawn = torch.get_num_threads(), draw(*shape)
    torch.set_num_threads(threads)
    try:
        assert near(attention(*drawn), *drawn)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_machines_with_fewer_registers_get_the_same(shape):
    drawn = draw(*shape)
    assert near(with_fewer_registers("attention")(*drawn, shape[2] ** -0.5), *drawn)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("registers", ["this machine's", "fewer"])
def test_bfloat16_is_rounded_only_at_the_end(shape, registers):
    """So the result is the bfloat16 number nearest to what float32 gives, or the one next to it where it is in between."""
    half: Any = [x.bfloat16() for x in draw(*shape)]
    run = attention if registers == "this machine's" else with_fewer_registers("attention")
    found, exact = run(*half, shape[2] ** -0.5), reference(*(x.double() for x in half))
    assert found.dtype == torch.bfloat16
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype):
    drawn: Any = [x.to(dtype) for x in draw(6, 2, 64, 5, 130, 3)]
    assert torch.equal(attention(*(x[1:2] for x in drawn)), attention(*drawn)[1:2])


def test_wrong_attention_is_seen():
    drawn = draw(4, 2, 64, 5, 100)
    assert not near(attention(*drawn) + 1e-3, *drawn)
    assert not near(attention(*drawn, scale=0.126), *drawn)


def test_tensors_may_lie_as_they_like():
    query, key, value, bias = draw(4, 2, 32, 5, 100, 2)
    lie: Any = [x.mT.contiguous().mT for x in (query, key, value, bias)]
    assert torch.equal(attention(*lie), attention(query, key, value, bias))
    for one in (bias[:1], bias[:, :, :1], bias[:1, :, :1]):  # of every row, of every node
        shared = one.expand_as(bias)
        assert torch.equal(attention(query, key, value, shared), attention(query, key, value, shared.contiguous()))
    grown = 3 * torch.randn(bias.shape)
    assert near(attention(query, key, value, bias + grown), query, key, value, bias + grown)


@pytest.mark.parametrize("op", ["this machine", "fewer registers"])
def test_weights_are_exponentials(op):
    """Two slots of scores 0 and x, and values that tell them apart: the ratio of the weights."""
    x = torch.linspace(-80, 0, 2001)
    query, key, value = torch.zeros(1, 1, len(x), 16), torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2, 16)
    query[0, 0, :, 0], key[0, 0, 1, 0], value[0, 0, :, :2] = x, 1, torch.eye(2)
    run = attention if op == "this machine" else with_fewer_registers("attention")
    weights = run(query, key, value, torch.zeros(1, 1, len(x), 2), 1.0)[0, :, 0]
    assert (weights[:, 1].double() / weights[:, 0] / x.double().exp() - 1).abs().max() < RATIO
    far = attention(query * 1e6, key, value, torch.zeros(1, 1, len(x), 2), 1.0)[0, :-1, 0, :2]
    assert torch.equal(far, torch.tensor([1.0, 0.0]).expand_as(far))


def test_slots_that_nothing_sees_at_the_ends_are_not_read():
    query, key, value, bias = draw(4, 2, 32, 5, 200, 2)
    bias[0, :, :, 150:], bias[1, :, :, 17:], bias[0, :, :, :70] = -torch.inf, -torch.inf, -torch.inf
    bias[0, :, 2, 70], bias[0, :, 3, 149] = 0, 0
    bias[0, :, :, 100], bias[1, :, :, 16] = 0, 0
    expected = attention(query, key, value, bias)
    for unread in (key, value):
        unread[0, :, 150:], unread[1, :, 17:], unread[0, :, :70] = torch.nan, torch.nan, torch.nan
    assert torch.equal(attention(query, key, value, bias), expected)


def test_nodes_that_see_nothing_get_zeros():
    query, key, value, bias = draw(4, 2, 32, 5, 70, 2)
    expected = attention(query, key, value, bias)
    bias[0, :, 3], bias[1] = -torch.inf, -torch.inf
    key[1], expected[0, 3], expected[1] = torch.nan, 0, 0
    assert torch.equal(attention(query, key, value, bias), expected)


@pytest.mark.parametrize("what", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_no_number_stays_none(where, what):
    query, key, value, bias = draw(4, 2, 32, 5, 200, 2)
    bias[..., 90] = 0
    seen = torch.zeros(2, 5, 4, 32, dtype=torch.bool)
    if where == "query":
        query[1, 2, 3, 0], seen[1, 3, 2] = what, True
    elif where == "key":
        key[0, 1, 90, 5], seen[0, :, 2:] = what, True
    else:
        value[0, 1, 90, 5], seen[0, :, 2:, 5] = what, True
    found = attention(query, key, value, bias)
    if (where, what) == ("key", torch.inf):  # a score of -inf is that of a slot that is not seen
        seen &= (query[..., 5] > 0).transpose(1, 2)[..., None]
    assert torch.equal(~found.isfinite(), seen)


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({"query": (2, 4, 5)}, "four dimensions"),
        ({"key": (2, 2, 9, 16)}, "do not fit"),
        ({"value": (2, 2, 8, 32)}, "do not fit"),
        ({"key": (2, 3, 9, 32), "value": (2, 3, 9, 32)}, "4 heads are not shared out among 3"),
        ({"bias": (2, 4, 5, 9)}, r"expected \[2, 1, 5, 9\]"),
        ({"value": (2, 2, 9, 24)}, "24 are not whole vectors of 16"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, refused):
    shapes = {"query": (2, 4, 5, 32), "key": (2, 2, 9, 32), "value": (2, 2, 9, 32), "bias": (2, 1, 5, 9), **changes}
    operands: Any = [torch.zeros(shape) for shape in shapes.values()]
    with pytest.raises(ValueError, match=refused):
        attention(*operands)


@pytest.mark.parametrize("place", range(4))
def test_other_types_are_refused(place):
    drawn: Any = [*draw(4, 2, 32, 5, 9)]
    drawn[place] = drawn[place].double()
    with pytest.raises(ValueError, match=r"float64.*: there are kernels for float32 and for bfloat16"):
        attention(*drawn)


def test_the_op_keeps_its_promises_to_torch():
    torch.library.opcheck(torch.ops.specdec.attention.default, (*draw(4, 2, 32, 5, 70, 2), 0.2))
