"""Layers with recurrent state in a cache: a state after the committed tokens, and what each node of the tree puts into it.

A forward pass is over tokens of a prompt, which enter the state at once, or over nodes of a tree. Nodes leave the state as it
is: they read it, and what their ancestors would put in (`specdec_kernels.reference` has the arithmetic). A commit puts in what
the accepted nodes have. So no token is read twice, nothing is taken back, and rows and trees may be of any shape.

A commit passes over the states once more, though the ops could fold accepted nodes in where the next ones read (`fold=`). On a
CPU that would save nothing. On a GPU, two reads and a write would become one of each: by arithmetic 1 % of what a step of
Qwen3-Next-80B moves for one row, and a quarter for 32 rows of Mamba2-2.7B. But states would be a commit behind what is counted,
until their layer is run again. A pass could then not be repeated (after an interrupt, or a capture that failed), and all would
have to be brought up to date before rows are copied or a part of the layers drafts.

Layers of transformers call what is here through `specdec.models.served_functions`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from specdec.models.layer_shapes import RecurrentShape
from specdec.models.recurrences import Recurrence
from specdec.models.served_functions import wait_for
from specdec.tree import chain
from specdec_kernels.reference.convolution import convolution, fold_convolution

if TYPE_CHECKING:
    from specdec.models.cache import TreeCache

_PIECE = 64  # tokens that enter a state in one product, where modelling modules' own functions cannot let them


class OfCache:
    """A layer of a cache of ours."""

    # weak: in a circle with its layers a cache would keep its memory until Python next looks for circles
    _owner: Any

    @property
    def _cache(self) -> TreeCache:
        cache = self._owner()
        assert cache is not None
        return cache


class RecurrentLayer(LinearAttentionCacheLayerMixin, OfCache):
    """One layer's convolution inputs and recurrent states.

    Args:
        cache: the cache that it is a layer of.
        shape: what it keeps.
        batch: number of rows.
        nodes: nodes that a row has room for.
    """

    is_sliding = False
    may_wait = False  # whether its functions may go uncalled in a pass

    def __init__(self, cache: TreeCache, shape: RecurrentShape, batch: int, nodes: int):
        LinearAttentionCacheLayerMixin.__init__(self)  # which says that there are no states to be taken
        self.record_past = True  # else some layers would take a token alone for one that needs no convolution
        self._owner = ref(cache)
        self._allocate(shape, batch, nodes)

    def _allocate(self, shape: RecurrentShape, batch: int, nodes: int) -> None:
        self.shape = shape
        # the last inputs of the text, then those of all nodes
        self.inputs = shape.input.zeros(batch, shape.size - 1 + nodes)
        self.state = shape.state.zeros(batch) if shape.state else None
        self.kept = {name: each.zeros(batch, nodes) for name, each in shape.kept.items()}
        self.fixed = {name: each.zeros() for name, each in shape.fixed.items()}

    @property
    def parts(self) -> list[Tensor]:
        """All that it keeps."""
        return [self.inputs, *([] if self.state is None else [self.state]), *self.kept.values(), *self.fixed.values()]

    @property
    def in_prompt(self) -> Tensor:
        """[rows, node] bool: which tokens of this pass are of a prompt."""
        return self._cache.in_prompt

    @property
    def recurs(self) -> bool:
        """Whether a recurrence follows the convolution."""
        return self.shape.kind is not None

    # What transformers' layers call.

    def lazy_initialization(self, *_: Any, **__: Any) -> None: ...

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        if state_idx:
            raise NotImplementedError("a layer with several convolutions")
        wait_for(self)
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        return recurrent_states

    # What their functions ask for.

    def convolve(
        self,
        original: Callable[..., Tensor],
        hidden_states: Tensor,  # [batch, channel, node]
        weight: Tensor,  # [channel, size]
        bias: Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> Tensor:
        """[batch, channel, node]: the convolution at the tokens of this pass."""
        cache, past = self._cache, self.shape.size - 1
        if cache.entering is not None:
            return self._convolve_prompt(original, hidden_states, weight, bias, activation)
        first = cache.view.first
        end = first + hidden_states.shape[2]
        self.inputs[:, past + first : past + end] = hidden_states.transpose(1, 2)
        places = cache.view.windows(self.shape.size).to(weight.device)
        out = convolution(self.inputs[:, : past + end], weight, bias, places)
        out = out if activation is None else ACT2FN[activation](out)
        return out.to(hidden_states.dtype).transpose(1, 2)

    def _convolve_prompt(
        self, original: Callable[..., Tensor], new: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        past, real = self.shape.size - 1, self._cache.entering
        assert real is not None
        known = self._of_rows(self.inputs)[:, :past].transpose(1, 2)
        inputs = torch.cat([known, new], 2)
        last = real.to(new.device)[:, None] + torch.arange(past, device=new.device)
        last = inputs.gather(2, last[:, None].expand(-1, inputs.shape[1], -1))
        self._set_rows(self.inputs[:, :past], last.transpose(1, 2))
        return original(inputs, weight, bias, activation=activation)[..., past:]

    def recur(self, original: Callable[..., Any], call: Recurrence) -> tuple[Tensor, Tensor]:
        """(what the recurrence returns at the tokens of this pass, a state that nobody needs)."""
        cache, state = self._cache, self.state
        assert state is not None
        if cache.entering is not None:
            return self._enter(original, call, cache.entering.to(state.device)), state
        nodes = cache.view.topology.parents.shape[1]
        for name, part in call.kept.items():
            self.kept[name][:, cache.view.first : nodes] = part
        for name, part in call.fixed.items():
            self.fixed[name].copy_(part)
        kept = {name: part[:, :nodes] for name, part in self.kept.items()}
        with _as_stored(state):
            read = call.read(call.own, kept, self.fixed, state, cache.view.topology)
        return call.result(read), state

    def _enter(self, original: Callable[..., Any], call: Recurrence, real: Tensor) -> Tensor:
        """Let the first real[b] tokens of each row enter its state. Other functions than ours compute in float32."""
        assert self.state is not None
        state = self._of_rows(self.state).clone()
        found = call.continued(original, state, real) if state.dtype == torch.float32 else None
        out, state = (self._enter_in_pieces(call, state, real), state) if found is None else found
        self._set_rows(self.state, state)
        return out

    def _enter_in_pieces(self, call: Recurrence, state: Tensor, real: Tensor) -> Tensor:
        read, count = [], next(iter(call.kept.values())).shape[1]
        for start in range(0, count, _PIECE):
            own, kept = ({k: v[:, start : start + _PIECE] for k, v in parts.items()} for parts in (call.own, call.kept))
            topology = chain(len(real), min(_PIECE, count - start), real.device)
            path = topology.parents + 1
            with _as_stored(state):
                read.append(call.read(own, kept, call.fixed, state, topology))
                call.fold(state, kept, call.fixed, path, (real - start).clamp(0, path.shape[1]))
        return call.result(torch.cat(read, 1))

    # What the cache calls.

    def keep(self, path: Tensor, count: Tensor) -> None:
        """Put in what the first count[b] nodes of path[b] have: path [batch, n] int64, count [batch] int64."""
        path, count = path.to(self.inputs.device), count.to(self.inputs.device)
        fold_convolution(self.inputs, self.shape.size, path, count)
        if self.shape.kind is not None and self.state is not None:
            with _as_stored(self.state):
                self.shape.kind.fold(self.state, self.kept, self.fixed, path, count)

    def renumber(self, count: Tensor, nodes: int) -> None:
        """Drop the first count[b] nodes; of the first `nodes`, those after become nodes 0, 1, ..."""
        place = torch.arange(nodes, device=self.inputs.device)
        place = (place + count.to(place.device)[:, None]).clamp(max=nodes - 1)  # [batch, nodes]
        rows = torch.arange(len(place), device=place.device)[:, None]
        for part in (self.inputs[:, self.shape.size - 1 :], *self.kept.values()):
            part[:, :nodes] = part[rows, place]

    def take(self, row: int, source: tuple[Tensor, Tensor | None] | None) -> None:
        """Begin a row with a copy of inputs and state (see `copied`), or with those of an empty text."""
        inputs, state = source or (0, 0)
        self.inputs[row, : self.shape.size - 1] = inputs
        if self.state is not None and state is not None:
            self.state[row] = state

    def copied(self, row: int) -> tuple[Tensor, Tensor | None]:
        """A copy of what is committed in a row."""
        return self.inputs[row, : self.shape.size - 1].clone(), None if self.state is None else self.state[row].clone()

    def _of_rows(self, part: Tensor) -> Tensor:
        rows = self._cache.rows
        return part if rows is None else part[rows.to(part.device)]

    def _set_rows(self, part: Tensor, new: Tensor) -> None:
        rows = self._cache.rows
        part[slice(None) if rows is None else rows.to(part.device)] = new.to(part.dtype)


def _as_stored(state: Tensor) -> AbstractContextManager[Any]:
    """Products with a state are in its own dtype, whatever autocast says: what is rounded in it stays."""
    return nullcontext() if state.is_meta else torch.autocast(state.device.type, enabled=False)
