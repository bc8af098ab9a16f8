"""What networks see in passes over whole texts: the text as it was, and drafts at many places of it."""

from __future__ import annotations

from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from specdec.models.level import Level


class TextLevel(Level):
    """Nodes that see what a mask says, of their own and of an earlier level.

    Args:
        positions: [batch, n] int64.
        seen: [1 or batch, n, earlier + n] bool: what each node sees of the nodes of `before` and of this level.
        before: the earlier level, whose pass is over.
    """

    def __init__(self, positions: Tensor, seen: Tensor, before: TextLevel | None = None):
        super().__init__(positions)
        self._seen, self._kept = seen, dict(before._kept) if before else {}
        self.all_positions = torch.cat([before.all_positions, positions], 1) if before else positions

    @cached_property
    def causal(self) -> TextLevel:
        made = copy(self)  # with the same keys and values
        made._seen = self._seen & (self.all_positions[:, None] <= self.positions[:, :, None])
        return made

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self._kept:
            keys, values = self._kept[layer]
            key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        self._kept[layer] = key, value
        return key, value

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        seen = self._seen
        if window is not None:
            seen = seen & (self.positions[:, :, None] - self.all_positions[:, None] < window)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


class BlocksLevel(Level):
    """Blocks at places of texts that a network has read. Each sees its text up to there, and itself.

    Attention takes the blocks of a text together, so that the text's keys and values need no copy for each.

    Args:
        text: what the texts were read into.
        roots: [batch, n] int64: the place of each block's first slot.
        slots: of a block.
    """

    def __init__(self, text: TextLevel, roots: Tensor, slots: int):
        super().__init__((roots[..., None] + torch.arange(slots, device=roots.device)).flatten(0, 1))
        self._blocks = roots.shape  # (batch, n)
        which = torch.arange(roots.shape[1], device=roots.device).repeat_interleave(slots)
        before = text.positions[:, None] < roots.repeat_interleave(slots, 1)[..., None]
        own = (which == which[:, None]).expand(len(roots), -1, -1)
        self._together = TextLevel(self.positions.view(len(roots), -1), torch.cat([before, own], 2), text)

    @cached_property
    def causal(self) -> BlocksLevel:
        made = copy(self)
        made._together = self._together.causal
        return made

    def _joined(self, x: Tensor) -> Tensor:
        """[batch, head, n * slots, size], of [batch * n, head, slots, size]."""
        return x.unflatten(0, self._blocks).transpose(1, 2).flatten(2, 3)

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._together.add(layer, self._joined(key), self._joined(value))

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        return self._together.mask(dtype, window)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        found = super().attend(layer, self._joined(query), key, value, window)
        return found.unflatten(1, (self._blocks[1], -1)).flatten(0, 1)
