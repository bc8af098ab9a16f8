"""A few tokens times a matrix: the kernel for CPUs against float64, however many tokens, rows and columns there are."""

import subprocess
import sys

import pytest
import torch
from cpu_variants import with_fewer_registers

from specdec_kernels import linear
from specdec_kernels.reference.linear import linear as reference

# Of float32: sums in any order are off by less than this times their length and their absolute terms.
EPSILON = 2.0**-24
# What is returned in bfloat16 is such a sum, rounded; by how much of its size at most.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
DTYPES = list(ROUNDING)


def near(found, x, weight):
    x, weight = x.double(), weight.double()
    exact, scale = reference(x, weight), x.abs() @ weight.abs().T
    bound = EPSILON * (x.shape[1] + 1) * scale
    return bool(((found - exact).abs() <= bound + ROUNDING[found.dtype] * (exact.abs() + bound)).all())


def random(dtype, *shapes):
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 12, 13, 25])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 15), (4, 16), (4, 32), (9, 17), (64, 40), (7, 256)])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_right(dtype, tokens, rows, columns, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, weight = random(dtype, (tokens, columns), (rows, columns))
    try:
        found = linear(x, weight)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == dtype and near(found, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    x, weight = random(dtype, (25, 40), (9, 40))
    whole = linear(x, weight)
    assert all(
        torch.equal(linear(x[first:last], weight), whole[first:last]) for first, last in ((0, 1), (3, 7), (5, 25))
    )


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_wrong_product_is_seen(dtype, error):
    x, weight = random(dtype, (5, 16), (4, 16))
    assert not near(linear(x, weight) + error, x, weight)


def test_tensors_may_lie_as_they_like():
    x, weight = torch.randn(24, 5).T, torch.randn(24, 8).T
    assert near(linear(x, weight), x, weight)
    assert near(linear(x[:, ::2], weight[:, ::2]), x[:, ::2], weight[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 4, 8])
def test_machines_with_fewer_registers_get_the_same(dtype, tokens):
    x, weight = random(dtype, (tokens, 40), (9, 40))
    assert near(with_fewer_registers("linear")(x, weight), x, weight)


@pytest.mark.parametrize("x, weight", [((3, 4), (2, 5)), ((3,), (2, 3)), ((2, 3, 4), (5, 4))])
def test_shapes_that_do_not_fit_are_refused(x, weight):
    with pytest.raises(ValueError, match=r"\[token, in\]"):
        linear(torch.randn(x), torch.randn(weight))


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="float64"):
        linear(torch.randn(2, 3).double(), torch.randn(4, 3).double())
    with pytest.raises(ValueError, match="bfloat16"):
        linear(torch.randn(2, 3), torch.randn(4, 3).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_keeps_its_promises_to_torch(dtype):
    torch.library.opcheck(torch.ops.specdec.linear.default, tuple(random(dtype, (5, 8), (3, 8))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none(dtype):
    x, weight = random(dtype, (5, 40), (4, 40))
    x[2, 39] = float("nan")
    assert linear(x, weight).isnan().any(1).tolist() == [False, False, True, False, False]


LAZY = """
import torch, specdec_kernels
from specdec_kernels.cpu import load
assert not load.cache_info().currsize
print(torch.ops.specdec.linear(torch.ones(2, 3), torch.ones(4, 3)).sum().item(), load.cache_info().currsize)
"""


def test_the_library_is_loaded_by_what_runs_an_op_first_and_not_before():
    found = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["24.0", "1"]
