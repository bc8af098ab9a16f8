"""Numbers whose rounding is decided by the last bit of a scale."""

import torch

from specdec_kernels.reference.stored_linear import GROUP


def halfway(groups: int) -> torch.Tensor:
    """[group, GROUP] float32: the first of each group is the largest, and the others lie halfway between two of its steps."""
    most, steps = torch.rand(groups, 1) + 0.5, torch.randint(-127, 127, (groups, GROUP)) + 0.5
    steps[:, 0] = 127
    return most * steps / 127
