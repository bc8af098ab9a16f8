"""Accepted nodes of all layers move to the front of the scratch of a KV cache."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(
    stack: Tensor,  # [layer, batch, slot, head, dim]: changed
    path: Tensor,  # [batch, n] int64: nodes, strictly ascending up to count[b], the first in its place already
    lengths: Tensor,  # [batch] int64: slots before the scratch
    count: Tensor,  # [batch] int64 <= n: how many nodes of the path are kept
) -> None:
    """Slot lengths[b] + i takes what is in slot lengths[b] + path[b, i], for 0 < i < count[b].

    Scratch slots that are not kept hold anything afterwards.
    """
    rows = torch.arange(len(path), device=path.device)[:, None] * stack.shape[2] + lengths[:, None]
    place = torch.arange(1, path.shape[1], device=path.device)
    source = rows + torch.where(place < count[:, None], path[:, 1:], place)
    flat = stack.flatten(1, 2)  # [layer, batch * slot, head, dim]
    flat.index_copy_(1, (rows + place).flatten(), flat.index_select(1, source.flatten()))
