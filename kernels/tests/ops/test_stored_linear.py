"""Products with matrices that are stored in fewer bits: the kernels against what `reference.stored_linear` says."""

from functools import partial
from typing import Any

import pytest
import torch
from cpu_variants import with_fewer_registers
from stored_cases import halfway

import specdec_kernels
from specdec_kernels import linear_int8
from specdec_kernels.cpu import define
from specdec_kernels.reference import stored_linear as reference

FORMATS = ("bf16", "int8", "int4")
ODD = [(1, 1), (3, 15), (16, 32), (17, 33), (64, 40), (7, 256)]
EPSILON = 2.0**-24  # of float32


def packed(name, weight):
    return getattr(reference, f"pack_{name}")(weight)


def product(name, x, stored, out) -> torch.Tensor:
    return getattr(specdec_kernels, f"linear_{name}")(x, *stored, out)


def agree(name, found, x, stored):
    """Within the rounding of float32 sums."""
    exact = getattr(reference, f"linear_{name}")(x, *stored, found.shape[-1])
    dense = getattr(reference, f"unpack_{name}")(*stored)[: found.shape[-1], : x.shape[-1]]
    # what 4-bit groups sum are two terms for each weight, both up to twice the largest weight of the group
    scale = 1.01 * x.abs() @ dense.abs().T + (name == "int4") * 4 * x.abs().sum(-1, True) * dense.abs().max()
    return bool(((found - exact).abs() <= EPSILON * (x.shape[-1] + 4) * scale).all())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 12, 13, 64])
@pytest.mark.parametrize("out, inputs", ODD)
def test_products_are_right(name, tokens, out, inputs):
    x, stored = torch.randn(tokens, inputs), packed(name, torch.randn(out, inputs))
    assert agree(name, product(name, x, stored, out), x, stored)


@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_product_is_seen(name):
    x, stored = torch.randn(5, 64), packed(name, torch.randn(16, 64))
    assert not agree(name, product(name, x, stored, 16) + 1e-2, x, stored)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_numbers_halfway_between_two_integers_are_rounded_as_by_the_reference(name):
    x, stored = halfway(2000), packed(name, torch.eye(reference.GROUP))  # which both formats store as it is
    step = x.abs().amax(1, True) / 127
    for op in (partial(product, name), lambda *a: with_fewer_registers(f"linear_{name}")(a[0], *a[1], a[2])):
        assert ((op(x, stored, reference.GROUP) - reference.rounded(x)).abs() < step / 2).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_gives_the_same_bits_among_any_others(name, threads):
    before = torch.get_num_threads()
    x, stored = torch.randn(64, 100), packed(name, torch.randn(90, 100))
    alone = torch.cat([product(name, row[None], stored, 90) for row in x])
    torch.set_num_threads(threads)
    try:
        for count in (2, 3, 8, 13, 30, 64):
            assert torch.equal(product(name, x[:count], stored, 90), alone[:count])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", FORMATS)
def test_machines_without_these_instructions_get_the_same(name):
    x, stored = torch.randn(5, 72), packed(name, torch.randn(41, 72))
    assert agree(name, with_fewer_registers(f"linear_{name}")(x, *stored, 41), x, stored)


@pytest.mark.parametrize("name", FORMATS)
def test_leading_dimensions_and_strides_may_be_any(name):
    x, stored = torch.randn(40, 2, 3).permute(1, 2, 0), packed(name, torch.randn(20, 40))
    found = product(name, x, stored, 20)
    assert found.shape == (2, 3, 20) and agree(name, found, x, stored)
    assert product(name, x[:0], stored, 20).shape == (0, 3, 20)


def test_a_product_over_no_inputs_is_0():
    weight = torch.zeros(1, 0, 16, 2, dtype=torch.bfloat16)
    assert specdec_kernels.linear_bf16(torch.zeros(3, 0), weight, 5).tolist() == [[0.0] * 5] * 3


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_number_stays_none_and_zeros_stay_zeros(name):
    x, stored = torch.randn(5, 64), packed(name, torch.randn(17, 64))
    x[1] = 0
    x[2, 63] = torch.nan
    x[3, 5] = torch.inf
    x[4] *= 1 if name == "bf16" else 1e-38
    found = product(name, x, stored, 17)
    assert found.isfinite().all(1).tolist() == [True, True, False, False, True] and not found[1].any()
    assert agree(name, found[[0, 1, 4]], x[[0, 1, 4]], stored)


@pytest.mark.parametrize("name", FORMATS)
def test_the_ops_keep_their_promises_to_torch(name):
    op = getattr(torch.ops.specdec, f"linear_{name}").default
    arguments: Any = (torch.randn(2, 3, 40), *packed(name, torch.randn(20, 40)), 20)
    torch.library.opcheck(op, arguments)


def test_without_a_compiler_an_op_is_its_reference(monkeypatch):
    monkeypatch.setattr("specdec_kernels.cpu.can_load", lambda: False)
    op = define(
        "without_a_compiler", "(Tensor x, Tensor weight, Tensor scale, int out) -> Tensor", reference.linear_int8
    )
    x, stored = torch.randn(2, 40), reference.pack_int8(torch.randn(20, 40))
    assert torch.equal(op(x, *stored, 20), reference.linear_int8(x, *stored, 20))


def test_weights_on_a_grid_of_gguf_stay_as_they_are():
    integers = torch.randint(0, 16, (32, 4, 32)).float()
    integers[..., 0], integers[..., 1] = 0, 15
    steps, least = (torch.randn(32, 4, 1).half().float() for _ in range(2))
    symmetric = torch.randint(0, 16, (32, 4, 32)).float() - 8
    symmetric[..., 5] = -8
    with_importance = symmetric.clamp(-7, 6)
    for grid in (integers * steps.abs() + least, symmetric * steps, with_importance * steps):
        weight = grid.flatten(1)
        assert torch.equal(reference.unpack_int4(*reference.pack_int4(weight)), weight)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_stored_matrix_are_those_of_the_whole(name):
    stored, ids = packed(name, torch.randn(40, 70)), torch.tensor([39, 0, 17, 17])
    unpack = getattr(reference, f"unpack_{name}")
    assert torch.equal(unpack(*reference.rows(ids, *stored)), unpack(*stored)[ids])


@pytest.mark.parametrize("name, most", [("bf16", 2**-8), ("int8", 1 / 127), ("int4", 1 / 8)])
def test_a_stored_weight_is_near_what_it_was(name, most):
    weight = torch.randn(30, 70)
    dense = getattr(reference, f"unpack_{name}")(*packed(name, weight))
    assert (dense[:30, :70] - weight).abs().max() <= most * weight.abs().max()
    assert not dense[30:].any()


@pytest.mark.parametrize("inputs, out", [(32, 20), (65, 20), (40, 15), (40, 33)])
def test_sizes_that_are_not_the_matrixs_are_refused(inputs, out):
    weight, scale = packed("int8", torch.randn(20, 40))
    with pytest.raises(ValueError, match=rf"\[2, {inputs}\], out {out}: the matrix has up to 32 outputs, 64 inputs"):
        linear_int8(torch.randn(2, inputs), weight, scale, out)


@pytest.mark.parametrize("name", FORMATS)
def test_other_types_are_refused(name):
    with pytest.raises(ValueError, match=r"float64.*x\.float\(\)"):
        product(name, torch.randn(2, 40).double(), packed(name, torch.randn(20, 40)), 20)
