"""What `specdec::linear` computes."""

from __future__ import annotations

from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T. x: [token, in]; weight: [out, in]; returns [token, out]."""
    return x @ weight.T
