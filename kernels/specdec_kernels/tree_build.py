"""The op `specdec::tree_build`: ancestors as bits and depths, from parents."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.reference import tree_build as reference


@torch.library.custom_op("specdec::tree_build", mutates_args=(), device_types="cuda")
def tree_build(parents: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """See `specdec_kernels.reference.tree_build`."""
    from specdec_kernels.backend import on
    from specdec_kernels.triton import tree_build as kernel

    with on(parents):
        return kernel.tree_build(parents, depth)


tree_build.register_kernel("cpu")(reference.tree_build)


@tree_build.register_fake
def _(parents, depth):
    batch, nodes = parents.shape
    return parents.new_empty((batch, nodes, -(-nodes // 32)), dtype=torch.int32), parents.new_empty((batch, nodes))
