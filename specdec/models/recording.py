"""A cache that keeps nothing and notes what its layers would keep: used once per model, by the probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from specdec.models.attention import View
from specdec.models.layer_shapes import LayerShape, Numbers, RecurrentShape, Slab
from specdec.models.recurrences import Recurrence
from specdec.models.recurrent import RecurrentLayer


class RecordingCache(Cache):
    """Keeps nothing and notes the shapes of its layers: used once per model to learn them.

    Args:
        kinds: layers of the kinds that the model makes for its own cache.
        view: the nodes of the one pass that it is for.
    """

    rows = entering = None

    def __init__(self, kinds: Sequence[Any], view: View):
        super().__init__(layers=[_recording(kind, self) for kind in kinds])
        self.view, self.in_prompt = view, torch.zeros_like(view.positions, dtype=torch.bool)

    def get_query_offset(self, layer_idx: int = 0) -> View:
        return self.view

    @property
    def shapes(self) -> list[LayerShape]:
        """What the layers would have kept."""
        return [LayerShape(getattr(layer, "slabs", None), getattr(layer, "shape", None)) for layer in self.layers]


class RecordingLayer(CacheLayerMixin):
    """A layer that keeps nothing and notes the shapes of its keys and values."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.slabs = tuple(Slab(t.shape[1], t.shape[3], t.dtype, t.device) for t in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class RecordingRecurrentLayer(RecurrentLayer):
    """A layer that takes its shape from the pass that it is first in. Used once per model, to learn the shapes."""

    may_wait = True  # which functions there are is not known yet
    recurs: Any = True

    def __init__(self, cache: Any):
        LinearAttentionCacheLayerMixin.__init__(self)
        self.record_past, self._owner = True, ref(cache)
        self.shape: Any = None  # as long as no function has asked
        self.given = False  # whether it has been given a state

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        self.given = True
        return super().update_conv_state(*args, **kwargs)

    def convolve(
        self, original: Callable[..., Tensor], hidden_states: Tensor, weight: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        batch, _, nodes = hidden_states.shape
        number = Numbers(tuple(hidden_states.shape[1:2]), hidden_states.dtype, hidden_states.device)
        self._allocate(RecurrentShape(weight.shape[1], number), batch, nodes)
        return super().convolve(original, hidden_states, weight, *args, **kw)

    def recur(self, original: Callable[..., Any], call: Recurrence) -> tuple[Tensor, Tensor]:
        known, (batch, nodes) = self.shape, next(iter(call.kept.values())).shape[:2]
        device = next(iter(call.kept.values())).device
        state = Numbers(call.state, call.dtype, device)
        kept = {name: Numbers(tuple(part.shape[2:]), call.dtype, device) for name, part in call.kept.items()}
        fixed = {name: Numbers(tuple(part.shape), call.dtype, device) for name, part in call.fixed.items()}
        self._allocate(RecurrentShape(known.size, known.input, type(call), state, kept, fixed), batch, nodes)
        return super().recur(original, call)


class _RecordingBoth(RecordingLayer, RecordingRecurrentLayer):
    """A layer that attends and has a recurrent state besides."""

    def __init__(self, cache: Any):
        RecordingLayer.__init__(self)
        RecordingRecurrentLayer.__init__(self, cache)


def _recording(kind: Any, cache: RecordingCache) -> Any:
    if not isinstance(kind, LinearAttentionCacheLayerMixin):
        return RecordingLayer()
    return _RecordingBoth(cache) if isinstance(kind, CacheLayerMixin) else RecordingRecurrentLayer(cache)
