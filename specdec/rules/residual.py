"""What the target law still owes after a drafted token is rejected: for one row in any arithmetic, and for a batch.

Of the mass `reach * p` owed at a node, a child drawn from `q` takes min(reach * p, q). What is left over, spread over the
cases in which the child was not taken (their probability is total + 1 - reach), is a law and the chance to emit from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def residual(reach: Any, p: np.ndarray, q: np.ndarray) -> tuple[Any, np.ndarray]:
    """(reach, law [vocab]) owed at a node after its child, drawn from `q` [vocab], was rejected."""
    rest = np.maximum(reach * p - q, 0)
    total = rest.sum()
    rejected = total + (1 - reach)
    # If nothing is left over, all of p was accepted, and only rounding has rejected the child.
    return (total / rejected if rejected > 0 else 1), (rest / total if total > 0 else p)


def residual_batch(reach: Tensor, p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The same for reach [batch, 1], p [batch, vocab] and rest = (reach * p - q)+ [batch, vocab]."""
    total = rest.sum(1, keepdim=True)
    rejected = total + (1 - reach)
    law = torch.where(total > 0, rest / total.where(total > 0, 1), p)
    return torch.where(rejected > 0, total / rejected.where(rejected > 0, 1), 1), law
