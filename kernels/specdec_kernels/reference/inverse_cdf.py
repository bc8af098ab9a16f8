"""Tokens from uniform numbers, in index order."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [...] int64 whose CDF under unnormalised `weights` [..., vocab] first exceeds `uniforms` [...]."""
    # float64: a float32 running sum over a large vocabulary moves thresholds by more than its own rounding
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[..., -1]
    threshold = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, threshold[..., None], right=True)[..., 0]
