"""Functions of modelling modules, which ask first whether a layer of our cache waits for them.

transformers' layers take their states from the cache and hand them to functions of the modelling module, which know no trees.
These functions ask here, where `serve` has put itself before them. A layer of the cache is told of the pass first, and notes
that for its own thread: the functions that the same thread calls next are for it. All other calls go to the functions that
were found, so that nothing changes for the model outside of our passes, or for another model that a hook runs within one.

Others may put functions of their own in the same places, and take them away again: a profiler, `mock.patch`. So every run
serves anew, and a layer that no function has asked for ends the pass with an error.
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
_REBOUND = (
    "Was a function of the modelling module replaced during the run (mock.patch, a profiler), or does a hook inside of a layer "
    "run another model? Do that before the run, or outside of the layer"
)


class _Here(threading.local):
    """The pass that a thread is in."""

    def __init__(self) -> None:  # not class attributes: torch.compile takes those to be the same in every thread
        self.inside = False  # whether it is a pass over a cache of ours
        self.layer: RecurrentLayer | None = None  # the one that the functions which are called next are for
        self.convolved = False  # whether the last call was of a convolution: a recurrence may be next


here = _Here()
_lock = threading.Lock()  # of `serve`


class _Served:
    """A function of a modelling module, which asks first whether a layer of ours waits for it."""

    def __init__(self, name: str, found: Callable[..., Any]):
        functools.update_wrapper(self, found)
        self._name, self._found = name, found
        self._kind: Any = KINDS.get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not here.inside:
            return self._found(*args, **kwargs)
        # Cleared at once: what was found may be another function's wrapper of one of ours.
        layer, here.layer = here.layer, None
        return self._convolve(layer, *args, **kwargs) if self._kind is None else self._recur(layer, *args, **kwargs)

    def _convolve(self, layer: RecurrentLayer | None, *args: Any, **kwargs: Any) -> Any:
        if layer is not None and here.convolved:
            if not layer.may_wait:
                raise RuntimeError(f"{self._name} is called again, or in the place of a recurrence. {_REBOUND}")
            layer = None  # which has no recurrence, then
        out = self._found(*args, **kwargs) if layer is None else layer.convolve(self._found, *args, **kwargs)
        here.convolved, here.layer = True, layer if layer is not None and layer.recurs else None
        return out

    def _recur(self, layer: RecurrentLayer | None, *args: Any, **kwargs: Any) -> Any:
        if not here.convolved:
            raise RuntimeError(f"{self._name} is called again, or without a convolution before it. {_REBOUND}")
        if layer is None:
            out = self._found(*args, **kwargs)
        else:
            out = layer.recur(self._found, self._kind(*args, in_prompt=layer.in_prompt, **kwargs))
        here.convolved = False
        return out


def serve(model: nn.Module) -> None:
    """Put ourselves before the functions of the modules that define the model's layers, for all models of these."""
    for module in {sys.modules.get(type(part).__module__) for part in model.modules()}:
        for name in (_CONVOLUTION, *KINDS):
            with _lock:
                found = getattr(module, name, None)
                if found is not None and not isinstance(found, _Served):
                    setattr(module, name, _Served(name, found))


def wait_for(layer: RecurrentLayer) -> None:
    """The functions that are called next are for this layer. Raises RuntimeError if another one still waits."""
    _check_asked()
    here.layer, here.convolved = layer, False


@contextlib.contextmanager
def one_pass() -> Iterator[None]:
    """A forward pass over a cache of ours. If it fails half-way, no layer is left waiting.

    Raises RuntimeError at the end if some function has not asked for the layer that it was called for.
    """
    here.inside = True
    try:
        yield
        _check_asked()
    finally:
        here.inside, here.layer, here.convolved = False, None, False


def _check_asked() -> None:
    if here.layer is not None and not here.layer.may_wait:
        which = " or ".join(KINDS) if here.convolved else _CONVOLUTION
        raise RuntimeError(f"A layer with recurrent state was computed without a call of {which}. {_REBOUND}")
