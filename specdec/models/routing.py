"""Changes to a model that one thread makes and no other sees: its attention, and the layers that it leaves out.

Several threads may run one model at a time, some of them by a plain `model.generate`. So nothing is written into the model's
configs: only a thread inside a `Route` reads another attention implementation from them. torch.compile follows all of this
code: what it compiles in one thread holds for that thread's state alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_STORED = "_attn_implementation_internal"  # the attribute that transformers' `_attn_implementation` reads


class _Here(threading.local):
    """The state of one thread."""

    def __init__(self) -> None:  # not class attributes: torch.compile takes those to be the same in every thread
        self.routes: list[Route] = []  # those that the thread is inside of, the innermost last
        self.left_out: frozenset[int] = frozenset()  # ids of the layers that it leaves out


_here = _Here()


class Route:
    """A context in which the model's attention goes through the implementation of this name, in this thread alone.

    Several threads may be inside of one route at once, and of different routes of one model.
    """

    def __init__(self, model: PreTrainedModel, name: str):
        configs = [model.config, *(m.config for m in model.modules() if isinstance(m, PreTrainedModel))]
        configs += [sub for config in configs for sub in _subconfigs(config)]
        self.name, self._configs = name, list({id(c): c for c in configs}.values())

    def __enter__(self) -> None:
        _here.routes.append(self)

    def __exit__(self, *_: object) -> None:
        _here.routes.pop()

    @property
    def here(self) -> bool:
        """Whether this thread is inside. A hook sees the passes of all threads, and asks this to serve its own."""
        return any(route is self for route in _here.routes)

    def covers(self, config: PreTrainedConfig) -> bool:
        """Whether this is one of the model's configs."""
        return any(each is config for each in self._configs)


def _subconfigs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for name in config.sub_configs:
        if (sub := getattr(config, name, None)) is not None:
            yield sub
            yield from _subconfigs(sub)


def left_out() -> frozenset[int]:
    """What stands for the layers that this thread leaves out."""
    return _here.left_out


def _implementation(config: PreTrainedConfig) -> str | None:
    """The attention implementation that transformers reads from a config."""
    for route in reversed(_here.routes):
        if route.covers(config):
            return route.name
    try:
        return config.__dict__[_STORED]
    except KeyError:
        raise AttributeError(_STORED) from None


def _store(config: PreTrainedConfig, name: str | None) -> None:
    config.__dict__[_STORED] = name


# Set on the class, for all models: other threads would see a change to a single config before it is restored.
setattr(PreTrainedConfig, _STORED, property(_implementation, _store))


_lock = threading.Lock()  # guards `_watched`
_watched: dict[nn.Module, _Watched] = {}  # layers that some thread leaves out
# of the tuples that layers return; 0 for a tensor alone
_lengths: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass
class _Watched:
    """A layer that asks, when it is run, whether the thread that runs it leaves it out."""

    found: Callable[..., Any] | None  # the forward function that the layer had as an attribute before
    forward: Callable[..., Any]  # the one that it has now
    users: int = 0  # how many `passing_through` contexts leave it out


def learn_outputs(layers: Iterable[nn.Module], run: Callable[[], object]) -> None:
    """Have `passing_through` hand on a tuple where a layer does, with None for what is beside the states there.

    Args:
        run: runs the layers; it is called at most once.
    """
    if all(layer in _lengths for layer in layers):
        return
    handles = [layer.register_forward_hook(_note_output) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def _note_output(layer: nn.Module, _: Any, output: Any) -> None:
    _lengths[layer] = len(output) if isinstance(output, tuple) else 0


@contextlib.contextmanager
def passing_through(layers: Collection[nn.Module]) -> Iterator[None]:
    """Inside, in this thread, these layers hand their input on unchanged. See `learn_outputs` for layers that return tuples."""
    found = _here.left_out
    for layer in layers:
        _watch(layer)
    _here.left_out = found.union(map(id, layers))
    try:
        yield
    finally:
        _here.left_out = found
        for layer in layers:
            _unwatch(layer)


def _watch(layer: nn.Module) -> None:
    with _lock:
        if layer not in _watched:
            found = vars(layer).get("forward")
            _watched[layer] = _Watched(found, _asking(layer, found))
            vars(layer)["forward"] = _watched[layer].forward
        _watched[layer].users += 1


def _unwatch(layer: nn.Module) -> None:
    with _lock:
        watched = _watched[layer]
        watched.users -= 1
        if watched.users:
            return
        del _watched[layer]
        if vars(layer).get("forward") is not watched.forward:  # somebody else has replaced it since: leave that
            return
        if watched.found is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = watched.found


def _asking(layer: nn.Module, found: Callable[..., Any] | None) -> Callable[..., Any]:
    run, key, length = layer.forward, id(layer), _lengths.get(layer, 0)

    def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if key not in _here.left_out:
            return run(hidden_states, *args, **kwargs)
        return (hidden_states, *[None] * (length - 1)) if length else hidden_states

    forward.__wrapped__ = found  # type: ignore[attr-defined] - `fingerprint` looks through it
    return forward
