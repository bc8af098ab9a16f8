"""What the layers of a model keep in a cache, as the probe finds it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.models.recurrences import Recurrence


@dataclass(frozen=True)
class Slab:
    """The shape of one token's keys or values in one layer."""

    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Numbers:
    """The shape of some of the numbers that a layer keeps, without batch and nodes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def zeros(self, *outer: int) -> Tensor:
        return torch.zeros(*outer, *self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class RecurrentShape:
    """What a layer keeps.

    Args:
        size: how many inputs its convolution sees.
        input: one token's input of the convolution.
        kind: its recurrence; None if it has nothing but the convolution.
        state: a row's state.
        kept: by name, what is kept of a node.
        fixed: by name, what is the same for all nodes of all rows.
    """

    size: int
    input: Numbers
    kind: type[Recurrence] | None = None
    state: Numbers | None = None
    kept: dict[str, Numbers] = field(default_factory=dict)
    fixed: dict[str, Numbers] = field(default_factory=dict)

    def bytes(self, nodes: int, states: int = 1) -> int:
        """Bytes that a row takes with room for so many nodes, and with so many states."""
        node = self.input.bytes + sum(each.bytes for each in self.kept.values())
        state = (self.size - 1) * self.input.bytes + (self.state.bytes if self.state else 0)
        return states * state + nodes * node


@dataclass(frozen=True)
class LayerShape:
    """What a layer keeps: nothing, if it uses another layer's keys and values.

    Args:
        slabs: its keys and its values.
        recurrent: its recurrent state, and what is kept of nodes for it.
    """

    slabs: tuple[Slab, Slab] | None = None
    recurrent: RecurrentShape | None = None
