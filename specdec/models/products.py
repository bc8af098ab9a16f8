"""On a CPU, products of a few tokens with large matrices read each matrix once, in passes of ours alone.

Torch's product of a few float32 rows takes up to three times as long as reading the matrix. `specdec_kernels.linear` does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.functional import linear as of_torch

from specdec_kernels.linear import linear, pays


class _Here(threading.local):
    def __init__(self) -> None:  # not a class attribute: torch.compile takes those to be the same in every thread
        self.passes = 0  # how many passes of ours this thread is inside of


_here = _Here()
_lock = threading.Lock()  # of `_known`, and of the counts in its values
_known: WeakKeyDictionary[nn.Module, _Few] = WeakKeyDictionary()  # by model; a layer does not keep its model alive


class _Few:
    """A model's plain linear layers, and how many passes are in progress."""

    def __init__(self, model: nn.Module):
        # Subclasses may compute something else, and a forward function of its own may be a hook of accelerate.
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
        self._forwards = [(vars(layer), _forward_of(layer)) for layer in layers]
        self._passes = 0

    def enter(self) -> None:
        self._passes += 1
        if self._passes == 1:
            for layer, forward in self._forwards:
                layer.setdefault("forward", forward)

    def leave(self) -> None:
        self._passes -= 1
        if self._passes == 0:
            for layer, forward in self._forwards:
                if layer.get("forward") is forward:  # else somebody has replaced it meanwhile
                    del layer["forward"]


def _forward_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        rows = input.shape[:-1]
        if not (_here.passes and type(weight) is nn.Parameter and pays(rows.numel(), input, weight)):
            return of_torch(input, weight, bias)
        found = linear(input.reshape(-1, input.shape[-1]), weight).view(*rows, -1)
        return found if bias is None else found.add_(bias)

    return forward


class FewRows:
    """A context for a forward pass of a model: its products of a few float32 rows are ours, in this thread.

    Only while some pass is in progress do its linear layers have forward functions of their own. Other threads that run the
    model meanwhile compute what they did.
    """

    def __init__(self, model: nn.Module):
        self._model = model

    def __enter__(self) -> None:
        with _lock:
            if self._model not in _known:
                _known[self._model] = _Few(self._model)
            _known[self._model].enter()
        _here.passes += 1

    def __exit__(self, *_: object) -> None:
        _here.passes -= 1
        with _lock:
            _known[self._model].leave()
