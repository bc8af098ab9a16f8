"""Whether a model still computes what it did: all that its modules hold, compared without knowing what any of it means.

Weights, switches and factors (the adapters of PEFT keep theirs as plain attributes of their layers), submodules and hooks.
It is asked for before runs, which may be short: one flat pass, a few microseconds per module.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

_PLAIN = {type(None), bool, int, float, str}
_GROUPS = (dict, list, tuple)


def fingerprint(*models: nn.Module, numbers: bool) -> list[Any]:
    """Equal to that of another time if nothing has changed in between that can be seen; keeps nothing alive.

    Args:
        models: the models; what is part of several counts once.
        numbers: whether it matters what stands in tensors (as far as torch counts the writing) or only where they lie.
            Where nobody counts, as in inference tensors and in weights that accelerate keeps elsewhere, writing cannot be
            seen: those equal nothing.
    """
    found: list[Any] = []  # names, each followed by what is seen of its value
    modules = dict.fromkeys(module for model in models for module in model.modules())
    groups: list[tuple[Any, Any]] = [("", vars(module)) for module in modules]  # each with its name
    met: set[int] = set()  # ids of the groups inside them: one may hold itself
    for title, group in groups:  # which grow in number
        before = len(found)
        # a list at once: other threads may add hooks of theirs
        for name, value in list(group.items() if isinstance(group, dict) else enumerate(group)):
            if type(value) in _PLAIN:
                found += name, value
            elif isinstance(value, _GROUPS):
                if id(value) in met:
                    found += name, type(value)
                elif value:  # most modules have a dozen kinds of hooks, and none of any kind
                    met.add(id(value))
                    groups.append((name, value))
            elif isinstance(value, Tensor):
                found += name, _place(value), numbers and _writes(value)
            elif isinstance(value, set):
                found += name, frozenset(value)
            elif (lasting := _lasting(value)) is not None:
                found += name, _Itself(lasting)
        if len(found) > before:
            found += title, type(group)
    return found


def _place(tensor: Tensor) -> tuple[int, torch.dtype, torch.device]:
    return tensor.data_ptr(), tensor.dtype, tensor.device


def _writes(tensor: Tensor) -> object:
    """How often it has been written to; something that equals nothing else where nobody counts."""
    return object() if tensor.is_meta or tensor.is_inference() else tensor._version


def _lasting(value: Any) -> Any:
    """What is there without the runs of the moment, whose hooks and functions specdec puts in; None if nothing."""
    ours = isinstance(value, FunctionType) and value.__module__.split(".")[0] == "specdec"
    return getattr(value, "__wrapped__", None) if ours else value


class _Itself:  # noqa: PLW1641 - nobody hashes it
    """Equal to what stands for the same object, while that lives."""

    __slots__ = ("_get",)

    def __init__(self, value: Any):
        try:
            self._get = ref(value)
        except TypeError:  # what cannot be referred to weakly is small: dtypes, devices, enumerations
            self._get = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._get() is not None and self._get() is other._get()
