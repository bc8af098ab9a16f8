"""From parents to what the other kernels read of a tree: ancestors as bits, and depths."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.reference.tree_attention import pack


def tree_build(
    parents: Tensor,  # [batch, node] int64: parents[:, 0] == -1 and 0 <= parents[:, i] < i
    depth: int,  # at least the longest path, in edges
) -> tuple[Tensor, Tensor]:
    """Ancestors, a node itself among them, [batch, node, word] int32 as `tree_attention` reads them; depths [batch, node]."""
    nodes = parents.shape[1]
    ancestors = torch.zeros(len(parents), nodes, nodes, dtype=torch.bool, device=parents.device)
    at = torch.arange(nodes, device=parents.device).expand(len(parents), -1)
    for _ in range(depth + 1):
        ancestors.scatter_(2, at[..., None], True)
        at = parents.gather(1, at).clamp(min=0)
    return pack(ancestors), ancestors.sum(2) - 1
