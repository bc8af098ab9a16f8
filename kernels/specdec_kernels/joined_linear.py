"""The op `specdec::joined_linear`: an input times some matrices, in one product if these lie one behind the other in memory.

It is made of torch's products, for any device: what it saves is launches, and small matrices that fill no machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def multiply(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """What the op runs."""
    if (whole := together(weights)) is not None:
        return x @ whole.T
    found = x.new_empty(len(x), sum(map(len, weights)))
    for weight, part in zip(weights, found.split([*map(len, weights)], 1), strict=True):
        torch.mm(x, weight.T, out=part)
    return found


_op = torch.library.custom_op("specdec::joined_linear", multiply, mutates_args=())


def joined_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """See `specdec_kernels.reference.joined_linear`."""
    if x.dim() != 2 or any(weight.dim() != 2 or weight.shape[1] != x.shape[1] for weight in weights):
        shapes = ", ".join(str([*weight.shape]) for weight in weights)
        raise ValueError(f"x {[*x.shape]}, weights {shapes}: expected [token, in] and [out, in].")
    return _op(x, weights)


def together(weights: Sequence[Tensor]) -> Tensor | None:
    """[sum of out, in]: matrices [out, in] that lie one behind the other, as one, without a copy; None if they do not.

    It owns nothing: use it while they are there.
    """
    first = weights[0]
    place = first.data_ptr()
    for weight in weights:
        alike = (weight.shape[1], weight.dtype, weight.device) == (first.shape[1], first.dtype, first.device)
        if not alike or not weight.is_contiguous() or weight.data_ptr() != place:
            return None
        place += weight.nbytes
    memory = torch._C._construct_storage_from_data_pointer(first.data_ptr(), first.device, place - first.data_ptr())
    return first.new_empty(0).set_(memory, 0, (sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))


@_op.register_fake
def _(x, weights):
    return x.new_empty(len(x), sum(map(len, weights)))
