"""The cache: allocated once, each row with its own length. Rejected nodes are simply not counted.

Slot s < lengths[b] of row b holds the committed token s. The slots after these are scratch for the nodes of the current tree,
in node order. Committing moves the accepted nodes to the front of the scratch and counts them; nothing is ever shifted, padded
or concatenated. All keys and values of one shape are in one tensor, so that a commit moves them all at once.
Layers with recurrent state (`specdec.models.recurrent`) have a state in place of the committed slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

import specdec_kernels
from specdec.models.attention import View
from specdec.models.layer_shapes import LayerShape, Slab
from specdec.models.memory import check_memory
from specdec.models.recording import RecordingLayer
from specdec.models.recurrent import OfCache, RecurrentLayer
from specdec_kernels.reference.compact import compact

# the argument's name in transformers from 5.24 on, before, and before in models without attention
CACHE_NAMES = "cache", "past_key_values", "cache_params"
_mixin: Any = GenerationMixin  # Any: its annotations ask for a model
_inputs = inspect.signature(_mixin.prepare_inputs_for_generation).parameters
GENERATE_CACHE = next(name for name in CACHE_NAMES if name in _inputs)  # the name that `model.generate` itself uses


def cache_argument(model: PreTrainedModel) -> str:
    """The name by which `model.forward` takes its cache.

    A user's own model may still use an old name where transformers says `cache`. A `forward(self, **kwargs)` is taken to hand
    its arguments to a model of transformers.
    """
    shown = inspect.signature(model.forward).parameters
    return next((name for name in (GENERATE_CACHE, *CACHE_NAMES) if name in shown), GENERATE_CACHE)


class TreeLayer(CacheLayerMixin, OfCache):
    """One layer's keys and values, [batch, slot, head, dim] each."""

    is_sliding = False  # sliding layers keep every slot too; the mask hides old ones

    def __init__(self, cache: TreeCache, keys: Tensor, values: Tensor):
        super().__init__()
        self._owner = ref(cache)
        # [batch * slot, head, dim]. The only views of their memory: compiled code would have to allow for overlaps.
        self._keys, self._values = keys.flatten(0, 1), values.flatten(0, 1)
        # Models with cross-attention ask whether these are empty.
        self.keys, self.values = self._keys, self._values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write [batch, head, node, dim] states to the slots of this forward pass; return all slots that are attended to."""
        return self._written(self._keys, key_states), self._written(self._values, value_states)

    def _written(self, flat: Tensor, states: Tensor) -> Tensor:
        cache = self._cache
        # Operations that change nothing are left out here and below: tracing them takes longest of all in a compiled pass.
        slots = cache.write_slots if cache.write_slots.device == flat.device else cache.write_slots.to(flat.device)
        flat.index_copy_(0, slots, cache.packed(states).transpose(1, 2).flatten(0, 1))
        return self._first(flat, cache.view.slots, states.dtype)

    def read(self, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the first slots of each row, [batch, head, slots, dim] each."""
        return self._first(self._keys, slots, dtype), self._first(self._values, slots, dtype)

    def _first(self, flat: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
        cache = self._cache
        stored = flat.unflatten(0, (-1, cache.capacity))
        stored = stored if slots == cache.capacity else stored[:, :slots]
        if cache.rows is not None:
            stored = stored[cache.rows.to(flat.device)]
        return cache.unpacked(stored.transpose(1, 2), dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.view.slots, 0

    def get_seq_length(self) -> int:
        return 0  # rows have lengths of their own, and positions are always given

    def get_max_length(self) -> int:
        return self._cache.capacity


class TreeRecurrentLayer(TreeLayer, RecurrentLayer):
    """A layer that attends and has a recurrent state besides."""

    def __init__(self, cache: TreeCache, keys: Tensor, values: Tensor, *recurrent: Any):
        TreeLayer.__init__(self, cache, keys, values)
        RecurrentLayer.__init__(self, cache, *recurrent)


@dataclass(frozen=True, eq=False)
class Source:
    """The first `count` slots of a row of a cache."""

    cache: TreeCache
    row: int
    count: int


@dataclass(frozen=True, eq=False)
class Mark:
    """What recurrent layers held after the first `count` tokens of a row, layer by layer: see `RecurrentLayer.copied`."""

    count: int
    states: list[tuple[Tensor, Tensor | None]]


class TreeCache(Cache):
    """The cache of a batch. It stores keys and values as the model gives them.

    A subclass that stores them in another form overrides `stored`, `packed` and `unpacked`, and is passed as
    `ModelTarget(model, cache=...)`. Whatever it stores of a token must be in that token's slot, as slots are moved.

    Args:
        layout: what each layer keeps.
        batch: number of rows.
        capacity: slots per row: committed tokens plus the largest tree.
        device: where lengths and slot numbers are.
        nodes: nodes of the largest tree: so many have room beside recurrent states.
        marks: whether rows keep a second recurrent state, at a place within their texts: see `mark`.
    """

    def __init__(
        self,
        layout: Sequence[LayerShape],
        batch: int,
        capacity: int,
        device: torch.device,
        nodes: int = 0,
        marks: bool = False,
    ):
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)  # [batch]: committed slots
        self.prompts = torch.zeros_like(self.lengths)  # [batch]: how many tokens of each row are its prompt
        self.rows: Tensor | None = None  # [rows] int64: the rows that forward passes run over; None: all
        self.entering: Tensor | None = None  # [rows] int64, in a pass over prompts: how many of its tokens each row has
        self.write_slots = self.lengths
        self._starts = torch.arange(batch, device=device)[:, None] * capacity  # [batch, 1]: first flat slot of each row
        pairs = [shape.slabs and (self.stored(shape.slabs[0]), self.stored(shape.slabs[1])) for shape in layout]
        slabs = [slab for pair in pairs if pair for slab in pair]
        states = [shape.recurrent for shape in layout if shape.recurrent]
        check_memory(slabs, states, batch, capacity, nodes, marks)
        self._stacks = {
            slab: torch.empty(
                slabs.count(slab), batch, capacity, slab.heads, slab.dim, dtype=slab.dtype, device=slab.device
            )
            for slab in dict.fromkeys(slabs)
        }
        views = {slab: iter(stack) for slab, stack in self._stacks.items()}
        layers: list[Any] = []
        for shape, pair in zip(layout, pairs, strict=True):
            stored = [next(views[slab]) for slab in pair or ()]
            recurrent = (shape.recurrent, batch, nodes) if shape.recurrent else ()
            kind = _KINDS[bool(stored), bool(recurrent)]
            layers.append(kind(self, *stored, *recurrent))
        super().__init__(layers=layers)
        self.recurrent = [layer for layer in layers if isinstance(layer, RecurrentLayer)]
        self.room = nodes if self.recurrent else capacity  # nodes that one pass may be over
        self.marked = marks and bool(self.recurrent)
        self._marks: dict[int, Mark] = {}  # by row
        self.torn = False  # whether an interrupt came between the layers, so that states are not those after `lengths`

    def __deepcopy__(self, memo: dict[int, Any]) -> TreeCache:
        memo[id(self)] = made = copy(self)
        made.__dict__.update(deepcopy(vars(self), memo))
        for layer in made.layers:
            if isinstance(layer, TreeLayer | RecurrentLayer):
                layer._owner = ref(made)
        return made

    def stored(self, slab: Slab) -> Slab:
        """The shape that is stored for keys or values of shape `slab`."""
        return slab

    def packed(self, states: Tensor) -> Tensor:
        """[batch, head, node, stored dim]: the stored form of keys or values [batch, head, node, dim]."""
        return states

    def unpacked(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """[batch, head, slot, dim] in `dtype`, as attention reads them: the inverse of `packed`."""
        return stored

    @property
    def bytes(self) -> int:
        """Bytes of keys, values and recurrent states."""
        parts = [*self._stacks.values(), *(part for layer in self.recurrent for part in layer.parts)]
        marked = (part for mark in self._marks.values() for pair in mark.states for part in pair if part is not None)
        return sum(part.nbytes for part in (*parts, *marked))

    @contextmanager
    def only(self, rows: Sequence[int]) -> Iterator[None]:
        """Inside, forward passes run over these rows alone, in this order."""
        every = [*rows] == [*range(len(self.lengths))]
        self.rows = None if every else torch.tensor(rows, device=self.lengths.device)
        try:
            yield
        finally:
            self.rows = None

    @property
    def committed(self) -> Tensor:
        """[rows] int64: the committed slots of the rows that forward passes run over."""
        return self.lengths if self.rows is None else self.lengths[self.rows]

    def open(self, view: View, entering: Tensor | None = None) -> None:
        """Direct the next forward pass to the slots of the view's queries, attending to what they see.

        Args:
            view: the queries. Those beyond the end of a row, which are of no account, share its last slot.
            entering: [rows] int64, in a pass over prompts: so many of the view's tokens enter each row's states at once. They
                are counted as committed by `rewind`.
        """
        nodes = torch.arange(view.first, view.topology.parents.shape[1], device=self.lengths.device)
        starts = self._starts if self.rows is None else self._starts[self.rows]
        self.write_slots = (starts + (view.lengths[:, None] + nodes).clamp(max=self.capacity - 1)).flatten()
        self.view, self.entering = view, entering
        if self.recurrent:
            prompts = self.prompts if self.rows is None else self.prompts[self.rows]
            # [rows, count] bool: which tokens of the pass are of a prompt
            self.in_prompt = view.positions < prompts[:, None]

    def mark(self, row: int, count: int, anew: bool) -> None:
        """Keep the recurrent states of a row, which has `count` committed tokens, for texts that will begin with these.

        Args:
            anew: whether it replaces a mark that the row has.
        """
        if anew or row not in self._marks:
            self._marks.pop(row, None)  # first, so that there is memory
            self._marks[row] = Mark(count, [layer.copied(row) for layer in self.recurrent])

    def reaches(self, row: int, count: int, wanted: int) -> int:
        """How many of the first `wanted` tokens of a row, of which `count` are committed, a text can go on from.

        Recurrent states are there at the end and at the mark alone.
        """
        if not self.recurrent:
            return min(count, wanted)
        places = count, self._marks[row].count if row in self._marks else 0
        return max((place for place in places if place <= wanted), default=0)

    def rewind(self, lengths: Tensor) -> None:
        """Count the first slots of each row as committed; all of them hold tokens. lengths: [rows] int64.

        Recurrent states must be those after these tokens already.
        """
        if self.rows is None:
            self.lengths.copy_(lengths)
        else:
            self.lengths[self.rows] = lengths

    def take(self, sources: Mapping[int, Source]) -> None:
        """Begin rows with slots that were read before, in this cache or another, and clear all their other slots."""
        for slab, stack in self._stacks.items():
            # copies: a row of this cache may be a source and begin anew itself
            found = {
                row: source.cache._stacks[slab][:, source.row, : source.count].clone()
                for row, source in sources.items()
                if (source.cache, source.row) != (self, row)
            }
            for row, source in sources.items():
                if row in found:
                    stack[:, row, : source.count] = found[row]
                stack[:, row, source.count :] = 0  # a hidden slot has weight 0, and 0 times garbage could be NaN
        self._take_states(sources)
        for row, source in sources.items():
            self.lengths[row] = source.count

    def _take_states(self, sources: Mapping[int, Source]) -> None:
        for index, layer in enumerate(self.recurrent):
            # copies, as above
            found = {row: source.cache._state(index, source) for row, source in sources.items() if source.count}
            for row in sources:
                layer.take(row, found.get(row))
        for row, source in sources.items():
            mark, own = self._marks.get(row), (source.cache, source.row) == (self, row)
            if mark and not (own and source.count >= mark.count):
                del self._marks[row]

    def _state(self, index: int, source: Source) -> tuple[Tensor, Tensor | None]:
        """A copy of what a recurrent layer holds there."""
        mark = self._marks.get(source.row)
        return mark.states[index] if mark and mark.count == source.count else self.recurrent[index].copied(source.row)

    def get_query_offset(self, layer_idx: int = 0) -> View:
        """The view, which transformers passes to the function that makes masks."""
        return self.view

    def keep(self, path: Tensor, count: Tensor) -> None:
        """Commit the first count[b] nodes of path[b]: path [batch, n] int64 node indices, count [batch] int64 <= n.

        path[:, 0] must be the root, which is in its slot already.
        """
        for slab, stack in self._stacks.items():
            move = specdec_kernels.compact if stack.device.type in specdec_kernels.DEVICES else compact
            move(stack, *(t.to(slab.device) for t in (path, self.lengths, count)))
        self.torn = bool(self.recurrent)
        for layer in self.recurrent:
            layer.keep(path, count)
        self.lengths += count
        self.torn = False

    def advance(self, count: Tensor) -> None:
        """Commit the first count[b] nodes of the chain that the last pass was over; those after are nodes 0, 1, ... now."""
        nodes = self.view.topology.parents.shape[1]
        self.torn = bool(self.recurrent)
        for layer in self.recurrent:
            layer.keep(self.view.topology.parents + 1, count)
            layer.renumber(count, nodes)
        self.lengths += count
        self.torn = False


class _Absent(RecordingLayer):
    """A layer that uses another layer's keys and values (Gemma 3n, Gemma 4), or none (experts), and so is never written to."""

    def __init__(self, cache: TreeCache):
        super().__init__()


# by whether a layer keeps keys and values, and whether it keeps a recurrent state
_KINDS: dict[tuple[bool, bool], Any] = {
    (False, False): _Absent,
    (True, False): TreeLayer,
    (False, True): RecurrentLayer,
    (True, True): TreeRecurrentLayer,
}
