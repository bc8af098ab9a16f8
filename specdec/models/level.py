"""One forward pass of a network that is not a transformers model: where its nodes stand, and what they attend to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_overlay

from specdec.models.attention import View, attend, mask
from specdec.models.cache import TreeCache


class Level(ABC):
    """The nodes that a pass is over, as its attention layers see them.

    Args:
        positions: [batch, count] int64: the position of each node, for position embeddings.
    """

    def __init__(self, positions: Tensor):
        self.positions = positions

    @cached_property
    def causal(self) -> Level:
        """The same nodes, where those of a block see only what is before them. Those of texts and trees see no more anyway."""
        return self

    @abstractmethod
    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the nodes' keys and values to a layer's; returns all of the layer's.

        Args:
            layer: which layer of the network.
            key, value: [batch, kv_head, count, head_dim].

        Returns:
            keys and values, [batch, kv_head, slot, head_dim].
        """

    @abstractmethod
    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor | None:
        """What the nodes see of the slots, as transformers' layers take it. See `attend`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        """Add the nodes' keys and values to a layer's, and attend to all that they see, scores times head_dim ** -0.5.

        Args:
            layer: which layer of the network.
            query: [batch, head, count, head_dim].
            key, value: [batch, kv_head, count, head_dim].
            window: how many positions up to its own a node sees; by default all of them.

        Returns:
            [batch, count, head, head_dim].
        """
        keys, values = self.add(layer, key, value)
        return attend(self, query, keys, values, self.mask(query.dtype, window))[0]


class CachedLevel(Level):
    """Nodes of a tree behind the committed ones of a cache."""

    def __init__(self, cache: TreeCache, view: View):
        super().__init__(view.positions)
        self.cache, self.view = cache, view
        self._layers: Any = cache.layers
        self._masks: dict[int | None, Tensor | None] = {}

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        slots = self._layers[layer].keys.dtype  # under autocast, norms give keys of another dtype than products
        keys, values = self._layers[layer].update(key.to(slots), value.to(slots))
        return keys.to(key.dtype), values.to(value.dtype)

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor | None:
        if window not in self._masks:
            # A view lets nodes see their ancestors and prefixes alone, so a window needs no more than its far end.
            pattern: Any = causal_mask_function if window is None else sliding_window_overlay(window)
            device = self.positions.device
            self._masks[window] = mask(
                mask_function=pattern, q_offset=self.view, device=device, dtype=dtype, local_size=window
            )
        return self._masks[window]

    @cached_property
    def causal(self) -> Level:
        return CachedLevel(self.cache, replace(self.view, topology=self.view.topology.causal))
