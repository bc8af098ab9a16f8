"""Laws as numbers per row, kernel against specification."""

import numpy as np
import pytest
import torch
from verification_cases import FILTERS, law_logits

from specdec_kernels.reference.law import law as reference
from specdec_kernels.triton.law import law

TOTAL = {
    torch.float64: 1e-14,
    torch.float32: 2e-7,
    torch.bfloat16: 2e-7,
}  # relative: roundings of exp, summed in float64


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_keeps_exactly_the_tokens_of_the_specification(dtype, filters):
    x = law_logits(70, dtype)
    (got, best), (due, first) = law(x, *filters), reference(x, *filters)
    kept = [(x.double() >= row[:, 1:2]) & x.isfinite() for row in (got, due)]
    assert torch.equal(*kept)
    assert torch.equal(best, first)
    assert torch.equal(got[:, 0], due[:, 0])
    torch.testing.assert_close(got[:, 2], due[:, 2], rtol=TOTAL[dtype], atol=0)


def test_rows_of_several_blocks_in_float64():
    x = law_logits(4100, torch.float64)
    (got, best), (due, first) = law(x, 0.75, None, None, 0.05), reference(x, 0.75, None, None, 0.05)
    assert torch.equal((x >= got[:, 1:2]), (x >= due[:, 1:2]))
    assert torch.equal(best, first)
    torch.testing.assert_close(got[:, 2], due[:, 2], rtol=TOTAL[torch.float64], atol=0)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_logits_that_are_no_law_have_no_total(filters):
    x = torch.zeros(4, 9)
    x[0, 3], x[1], x[2, 2] = torch.nan, -torch.inf, torch.inf
    for compute in (law, reference):
        with np.errstate(invalid="ignore"):
            assert compute(x, *filters)[0][:, 2].isnan().tolist() == [True, True, True, False]
