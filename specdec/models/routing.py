"""What one thread changes in a model, and no other thread sees: the attention it runs, and the layers it leaves out.

Several threads may run one model at a time, ours and a plain `model.generate` beside them. So nothing is written into the
model's configs: while a thread is inside a `Route`, that thread, and no other, reads another attention implementation from
them. torch.compile follows all that is here: what it compiles in one thread holds for that thread's state alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_STORED = "_attn_implementation_internal"  # the attribute that transformers' `_attn_implementation` reads


class _Here(threading.local):
    """Of the thread that reads it."""

    def __init__(self) -> None:  # not attributes of the class: torch.compile takes those for the same in every thread
        self.routes: list[Route] = []  # that it is inside of, the innermost last
        self.left_out: frozenset[int] = frozenset()  # ids of layers


_here = _Here()


class Route:
    """While a thread is inside, the model's attention goes, in that thread, through the implementation of this name.

    Threads may be inside of the same one together, and of others of the same model.
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
        """Whether this thread is inside: what hooks ask that serve the passes of one run, and see those of all threads."""
        return any(route is self for route in _here.routes)

    def covers(self, config: PreTrainedConfig) -> bool:
        """Whether it is one of the model's."""
        return any(each is config for each in self._configs)


def _subconfigs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for name in config.sub_configs:
        if (sub := getattr(config, name, None)) is not None:
            yield sub
            yield from _subconfigs(sub)


def _implementation(config: PreTrainedConfig) -> str | None:
    """What transformers is told when it reads which attention implementation a config has."""
    for route in reversed(_here.routes):
        if route.covers(config):
            return route.name
    try:
        return config.__dict__[_STORED]
    except KeyError:
        raise AttributeError(_STORED) from None


def _store(config: PreTrainedConfig, name: str | None) -> None:
    config.__dict__[_STORED] = name


# Of the class, once for all models: to change and restore each config would show to other threads, in between.
setattr(PreTrainedConfig, _STORED, property(_implementation, _store))


_lock = threading.Lock()  # of `_watched`
_watched: dict[nn.Module, _Watched] = {}  # layers that some thread leaves out


@dataclass
class _Watched:
    """A layer that asks, when it is run, whether the thread that runs it leaves it out."""

    found: Callable[..., Any] | None  # the forward function that the layer had of its own
    forward: Callable[..., Any]  # the one that it has now
    users: int = 0  # how many are inside `passing_through` with it


@contextlib.contextmanager
def passing_through(layers: Collection[nn.Module]) -> Iterator[None]:
    """Inside, in this thread, these layers hand their input on unchanged."""
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
        if vars(layer).get("forward") is not watched.forward:  # somebody has put another in its place: it stays
            return
        if watched.found is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = watched.found


def _asking(layer: nn.Module, found: Callable[..., Any] | None) -> Callable[..., Any]:
    run, key = layer.forward, id(layer)

    def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if key in _here.left_out else run(hidden_states, *args, **kwargs)

    forward.__wrapped__ = found  # type: ignore[attr-defined] - for whoever wants to know what the layer has of its own
    return forward
