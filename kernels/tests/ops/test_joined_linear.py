"""An input times matrices, one product if they lie together, against the reference."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specdec_kernels import joined_linear
from specdec_kernels.joined_linear import multiply
from specdec_kernels.reference.joined_linear import joined_linear as reference

OUTS = [16, 4, 4]


class Products(TorchDispatchMode):
    """Counts the products that torch computes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.mm
        return func(*args, **(kwargs or {}))


APART = {
    "another order": lambda weights: weights[::-1],
    "a gap": lambda weights: weights[::2],
    "other storages": lambda weights: [weight.clone() for weight in weights],
    "transposed": lambda weights: [weight.T.contiguous().T for weight in weights],
}


@pytest.mark.parametrize("apart", [None, *APART])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_matrices_that_lie_together_are_one_product_and_others_one_each(apart, dtype):
    x, weights = torch.randn(5, 40).to(dtype), [*torch.randn(sum(OUTS), 40).to(dtype).split(OUTS)]
    if apart:
        weights = APART[apart](weights)
    with Products() as products:
        found = multiply(x, weights)
    assert products.count == (len(weights) if apart else 1) and found.is_contiguous()
    torch.testing.assert_close(found, reference(x, weights))


def test_parts_of_a_larger_storage_may_lie_together():
    whole = torch.randn(50, 8)
    weights = [whole[10:13], whole[13:20]]
    with Products() as products:
        found = multiply(x := torch.randn(3, 8), weights)
    assert products.count == 1
    torch.testing.assert_close(found, reference(x, weights))


def test_the_op_keeps_its_promises_to_torch():
    arguments = torch.randn(5, 8), [*torch.randn(6, 8).split([4, 2])]
    torch.library.opcheck(torch.ops.specdec.joined_linear.default, arguments)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"weights \[2, 5\].*\[token, in\]"):
        joined_linear(torch.randn(3, 4), [torch.randn(2, 5)])
