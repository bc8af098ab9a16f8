"""Functions of modelling modules, which ask first whether a layer of our cache waits for them.

transformers' layers take their states from the cache and hand them to functions of the modelling module, which know no trees.
These functions ask here, where `serve` has put itself before them. A layer of the cache is told of the pass first, and notes
that for its own thread: the functions that the same thread calls next are for it. All other calls go to the functions that
were found, so that nothing changes for the model outside of our passes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from specdec.models.recurrences import KINDS

if TYPE_CHECKING:
    from specdec.models.recurrent import RecurrentLayer

_CONVOLUTION = "causal_conv1d_fn"


class _Here(threading.local):
    """The pass that a thread is in."""

    def __init__(self) -> None:  # not class attributes: torch.compile takes those to be the same in every thread
        self.inside = False  # whether it is a pass over a cache of ours
        self.layer: RecurrentLayer | None = None  # the one that the functions which are called next are for


here = _Here()
_lock = threading.Lock()  # of `serve`


class _Served:
    """A function of a modelling module, which asks first whether a layer of ours waits for it."""

    def __init__(self, name: str, found: Callable[..., Any]):
        functools.update_wrapper(self, found)
        self._name, self._found, self._kind = name, found, KINDS.get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = here.layer
        if layer is None:
            if here.inside:
                raise NotImplementedError(f"{self._name} is called again, or for no layer of the cache")
            return self._found(*args, **kwargs)
        if self._kind is None:
            return layer.convolve(self._found, *args, **kwargs)
        here.layer = None
        return layer.recur(self._found, self._kind(*args, prompt=layer.enters, **kwargs))


def serve(model: nn.Module) -> None:
    """Put ourselves before the functions of the modules that define the model's layers: once, for all models of these."""
    for module in {sys.modules.get(type(part).__module__) for part in model.modules()}:
        for name in (_CONVOLUTION, *KINDS):
            with _lock:
                found = getattr(module, name, None)
                if found is not None and not isinstance(found, _Served):
                    setattr(module, name, _Served(name, found))


@contextlib.contextmanager
def one_pass() -> Iterator[None]:
    """A forward pass over a cache of ours. If it fails half-way, no layer is left waiting."""
    here.inside = True
    try:
        yield
    finally:
        here.inside, here.layer = False, None
