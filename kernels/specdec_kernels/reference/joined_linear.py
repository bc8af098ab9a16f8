"""What `specdec::joined_linear` computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x weight^T of each weight, side by side. x: [token, in]; weights: [out, in] each; returns [token, sum of out]."""
    return torch.cat([x @ weight.T for weight in weights], 1)
