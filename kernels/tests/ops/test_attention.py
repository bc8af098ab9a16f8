"""Attention of a few nodes: the kernel for CPUs against the specification, whatever is seen and however tensors lie."""

from typing import Any

import pytest
import torch
from attention_cases import TOLERANCE, Case, draw
from cpu_variants import with_fewer_registers
from torch import Tensor

from specdec_kernels import attention
from specdec_kernels.reference import tree_attention as reference

torch.set_num_threads(1)
RATIO = 16 * 2.0**-22  # of two weights in float32: exponentials are off by less than four units in the last place

CASES = [
    Case(5, 261),
    Case(3, 64, 4, 4, 32),  # one query head to a key head
    Case(5, 65, 8, 1, 16),  # one key head: three packs of queries
    Case(1, 6, 2, 1),
    Case(24, 130, 6, 2, 48),  # dims that are not fours of vectors
    Case(2, 9, 3, 3, 20, 16, batch=3),  # keys that are not whole vectors, and of another size than values
    Case(7, 200, 4, 2, 80, batch=4),
    Case(40, 100, batch=3, earlier=30),  # trees of three words
    Case(6, 300, window=9, batch=3, earlier=3),
    Case(5, 200, softcap=2.0, sinks=True, batch=3),
    Case(8, 200, window=70, softcap=30.0, sinks=True, batch=3, dtype=torch.bfloat16),
    Case(1, 300, 9, 3, dtype=torch.bfloat16),
]


def exact(arguments: dict[str, Any]) -> Tensor:
    """The specification in float64."""
    wide: dict[str, Any] = {
        n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in arguments.items()
    }
    return reference.tree_attention(**wide)[0]


def drawn(case: Case) -> dict[str, Any]:
    return draw(case, 0)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_is_right(case, threads):
    before, arguments = torch.get_num_threads(), drawn(case)
    torch.set_num_threads(threads)
    try:
        assert off(attention(**arguments), exact(arguments)) < TOLERANCE[case.dtype]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_machines_with_fewer_registers_get_the_same(case, monkeypatch):
    arguments = drawn(case)
    monkeypatch.setitem(attention.__globals__, "_op", with_fewer_registers("attention"))
    assert off(attention(**arguments), exact(arguments)) < TOLERANCE[case.dtype]


def test_wrong_attention_is_seen():
    arguments = drawn(CASES[0])
    assert off(attention(**arguments) + 1e-3, exact(arguments)) > TOLERANCE[torch.float32]
    assert off(attention(**{**arguments, "scale": 0.126}), exact(arguments)) > TOLERANCE[torch.float32]


def test_tensors_may_lie_as_they_like():
    arguments = drawn(Case(5, 100, batch=2))
    lie: dict[str, Any] = dict(arguments)
    lie |= {name: arguments[name].mT.contiguous().mT for name in ("first", "ancestors")}
    lie["lengths"] = torch.stack([arguments["lengths"]] * 2, 1)[:, 0]
    assert torch.equal(attention(**lie), attention(**arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_room_behind_the_last_slot_that_is_seen_is_not_read(dtype):
    arguments = drawn(Case(5, 100, batch=3, dtype=dtype))
    expected = attention(**arguments)
    for name in ("key", "value"):
        room = torch.full((3, 2, 1000, 64), torch.nan, dtype=dtype)
        arguments[name] = torch.cat([arguments[name], room], 2)
    assert torch.equal(attention(**arguments), expected)


def test_words_that_tell_of_slots_which_are_not_there_are_cut():
    arguments = drawn(Case(5, 100))
    last = arguments["key"].shape[2]
    arguments: dict[str, Any] = {n: x.nan_to_num() if torch.is_tensor(x) else x for n, x in arguments.items()}
    arguments["lengths"] = torch.full_like(arguments["lengths"], last)
    assert off(attention(**arguments), exact(arguments)) < TOLERANCE[torch.float32]


def test_nodes_that_see_nothing_get_zeros():
    arguments = drawn(Case(5, 70))
    expected = attention(**arguments)
    arguments["first"][0, 3], arguments["ancestors"][0, 3], expected[0, 3] = 1000, 0, 0
    assert torch.equal(attention(**arguments), expected)


@pytest.mark.parametrize("op", ["this machine", "fewer registers"])
def test_weights_are_exponentials(op, monkeypatch):
    """Two slots of scores 0 and x, and values that tell them apart: the ratio of the weights."""
    if op == "fewer registers":
        monkeypatch.setitem(attention.__globals__, "_op", with_fewer_registers("attention"))
    x = torch.linspace(-80, 0, 201)
    query, key, value = torch.zeros(1, 1, len(x), 16), torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2, 16)
    query[0, 0, :, 0], key[0, 0, 1, 0], value[0, 0, :, :2] = x, 1, torch.eye(2)
    none = torch.zeros(1, len(x), dtype=torch.int32)
    sight = none, torch.tensor([2], dtype=torch.int32), none[..., None]
    weights = attention(query, key, value, *sight, 1.0)[0, :, 0]
    assert (weights[:, 1].double() / weights[:, 0] / x.double().exp() - 1).abs().max() < RATIO
    far = attention(query * 1e6, key, value, *sight, 1.0)[0, :-1, 0, :2]
    assert torch.equal(far, torch.tensor([1.0, 0.0]).expand_as(far))


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_no_number_stays_none(where):
    arguments = drawn(Case(5, 200, batch=1))
    arguments[where][0, 1, 3] = torch.nan
    found = attention(**arguments).isnan()
    if where == "query":  # of one head's node
        assert found[0, 3, 1].all() and found.sum() == 64
    else:  # that slot is seen by all nodes of the heads that share it
        assert found[0, :, 2:].all() and not found[0, :, :2].any()


def test_other_shapes_and_types_are_refused():
    arguments = drawn(Case(2, 9, 4, 2, 24))
    with pytest.raises(ValueError, match=r"values of 24 torch\.float32 are not float32 or bfloat16 in multiples of 16"):
        attention(**arguments)
    with pytest.raises(ValueError, match=r"values of 64 torch\.float64 are not"):
        attention(**drawn(Case(2, 9, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"lengths is \[1\], not \[2\]"):
        attention(**{**drawn(Case(2, 9, batch=2)), "lengths": torch.zeros(1, dtype=torch.int32)})


@pytest.mark.parametrize("case", [CASES[6], CASES[9], CASES[10]], ids=str)
def test_the_op_keeps_its_promises_to_torch(case):
    arguments: dict[str, Any] = {n: x.nan_to_num() if torch.is_tensor(x) else x for n, x in drawn(case).items()}
    sinks = arguments.pop("sinks", None)
    operands = *(arguments.pop(n) for n in ("query", "key", "value", "first", "lengths", "ancestors")), 0.2, 2.0, sinks
    torch.library.opcheck(torch.ops.specdec.attention.default, operands)
