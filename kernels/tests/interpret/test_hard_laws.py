"""Sibling rejection in Triton decides as torch's does on laws that are hard for floating point, and wrong kernels do not."""

import pytest
from kernel_decisions import disagreements
from planted import planted

import specdec_kernels.triton.verify as kernel

SETS = 210
BUGS = {
    "weights of the children among those off them": (
        "_put(b_w, o_v, b_token, b_here, tl.zeros([WIDTH], tl.float64), WIDTH)",
        "b_w",
    ),
    "weights not in units": (
        "& 0x7FF0000000000000)",
        "* 0 + 0x3FF0000000000000)",
    ),
}


def test_the_kernel_decides_as_torch_does_where_decisions_change():
    found = list(disagreements(kernel.verify, SETS))
    assert sum(sets for sets, _ in found) > SETS // 2
    assert sum(otherwise for _, otherwise in found) == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflows and NaN, which is what they are
@pytest.mark.parametrize("bug", BUGS)
def test_planted_faults_are_found(bug, tmp_path):
    wrong_kernel = planted(kernel, *BUGS[bug], tmp_path)
    assert any(otherwise for _, otherwise in disagreements(wrong_kernel.verify, SETS))
