"""Products with matrices stored in integers, kernel against reference, with new inputs each run."""

from typing import Any

import pytest
import torch
from stored_cases import halfway
from verification_cases import fresh_seed

from specdec_kernels.reference import stored_linear as reference
from specdec_kernels.triton import stored_linear as kernel

EPSILON = 2.0**-24  # of float32
SIZES = [(1, 16, 32), (3, 15, 40), (16, 70, 33), (17, 65, 96), (70, 20, 64), (2, 16, 1000)]  # tokens, outputs, inputs


def drawn(name, tokens, out, inputs) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(fresh_seed())
    return torch.randn(tokens, inputs), getattr(reference, f"pack_{name}")(torch.randn(out, inputs))


def product(x, stored, out) -> torch.Tensor:
    weight, scales = stored
    return kernel.stored_linear(x, weight, scales, out)


def agree(name, found, x, stored):
    """Within the rounding of float32 sums, of two terms for each weight in int4."""
    exact = getattr(reference, f"linear_{name}")(x, *stored, found.shape[1])
    dense = getattr(reference, f"unpack_{name}")(*stored)[: found.shape[1], : x.shape[1]]
    scale = 1.01 * x.abs() @ dense.abs().T + (name == "int4") * 4 * x.abs().sum(1, True) * dense.abs().max()
    return bool(((found - exact).abs() <= EPSILON * (x.shape[1] + 4) * scale).all())


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("tokens, out, inputs", SIZES)
def test_products_are_right(name, tokens, out, inputs):
    x, stored = drawn(name, tokens, out, inputs)
    assert agree(name, product(x, stored, out), x, stored)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_numbers_halfway_between_two_integers_are_rounded_as_by_the_reference(name):
    x, stored = halfway(100), getattr(reference, f"pack_{name}")(torch.eye(reference.GROUP))  # stored as it is
    step = x.abs().amax(1, True) / 127
    assert ((product(x, stored, reference.GROUP) - reference.rounded(x)).abs() < step / 2).all()


@pytest.mark.parametrize("blocks, parts", [(224, 1), (64, 6), (16, 16), (3000, 1)])
def test_programs_fill_the_processors_of_an_h200(blocks, parts):
    """For 128 groups of inputs."""
    assert -(-128 // kernel.part_of(128, blocks, 132)) == parts


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_wrong_product_is_seen(name):
    x, stored = drawn(name, 5, 20, 64)
    assert not agree(name, product(x, stored, 20) + 1e-2, x, stored)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_is_no_number_stays_none_and_small_numbers_are_zeros(name):
    x, stored = drawn(name, 5, 17, 64)
    x[0], x[1, 63], x[2, 5] = 0, torch.nan, torch.inf
    x[3] *= 1e-38
    found = product(x, stored, 17)
    assert found.isfinite().all(1).tolist() == [True, False, False, True, True] and not found[[0, 3]].any()
    assert agree(name, found[4:], x[4:], stored)
