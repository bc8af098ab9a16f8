"""On a CPU, products of a few tokens with large matrices read each matrix once, in passes of ours alone.

Torch's product of a few float32 rows takes up to three times as long as reading the matrix. `specdec_kernels.linear` does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as of_torch

from specdec_kernels.cpu import can_load
from specdec_kernels.linear import linear, pays


class _Here(threading.local):
    def __init__(self) -> None:  # not a class attribute: torch.compile takes those to be the same in every thread
        self.passes = 0  # how many passes of ours this thread is inside of


_here = _Here()
_lock = threading.Lock()  # of `_known`, and of the counts in its values
_known: WeakKeyDictionary[nn.Module, _Few] = WeakKeyDictionary()  # by model


class _Few:
    """A model's plain linear layers, and how many passes are in progress."""

    def __init__(self, model: nn.Module):
        # Subclasses may compute something else, and a forward function of its own may be a hook of accelerate.
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
        self._forwards = [
            (ref(layer), _forward_of(ref(layer))) for layer in layers
        ]  # weights may be replaced, and freed
        self._passes = 0

    def enter(self) -> None:
        self._passes += 1
        if self._passes == 1:
            for known, forward in self._forwards:
                if (layer := known()) is not None:
                    vars(layer).setdefault("forward", forward)

    def leave(self) -> None:
        self._passes -= 1
        if self._passes == 0:
            for known, forward in self._forwards:
                if (layer := known()) is not None and vars(layer).get(
                    "forward"
                ) is forward:  # else somebody replaced it
                    del vars(layer)["forward"]


def _forward_of(known: ref[nn.Linear]) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        layer = known()
        assert layer is not None
        weight, bias, rows = layer.weight, layer.bias, input.shape[:-1]
        mine = _here.passes and not torch.is_autocast_enabled("cpu")
        if not (mine and type(weight) is nn.Parameter and pays(rows.numel(), input, weight)):
            return of_torch(input, weight, bias)
        found = linear(input.reshape(-1, input.shape[-1]), weight).view(*rows, -1)
        return found if bias is None else found.add_(bias)

    return forward


def few_rows(device: torch.device, *models: nn.Module) -> AbstractContextManager[object]:
    """A context for passes of these models over a few tokens: `FewRows` where that is faster."""
    return FewRows(*models) if device.type == "cpu" and can_load() else nullcontext()


class FewRows:
    """A context in which models' products of a few float32 rows are ours, in this thread.

    Only while some thread is inside do their linear layers have forward functions of their own. Other threads that run the
    models meanwhile compute what they did.
    """

    def __init__(self, *models: nn.Module):
        self._models = models

    def __enter__(self) -> None:
        with _lock:
            for model in self._models:
                if model not in _known:
                    _known[model] = _Few(model)
                _known[model].enter()
        _here.passes += 1

    def __exit__(self, *_: object) -> None:
        _here.passes -= 1
        with _lock:
            for model in self._models:
                _known[model].leave()
