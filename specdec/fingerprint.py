"""Whether a model still computes what it did: all that its modules hold, compared without knowing what any of it means.

Weights, switches and factors (the adapters of PEFT keep theirs as plain attributes of their layers), submodules and hooks.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any
from weakref import ref

from torch import Tensor, nn


def fingerprint(*models: nn.Module, numbers: bool) -> list[Any]:
    """Equal to that of another time if nothing has changed in between that can be seen; keeps nothing alive.

    Args:
        models: the models; what is part of several counts once.
        numbers: whether it matters what stands in tensors (as far as torch counts the writing) or only where they lie.
            Numbers that are elsewhere, as of weights that accelerate offloads, cannot be seen: those equal nothing.
    """
    modules = dict.fromkeys(module for model in models for module in model.modules())
    return [_seen(vars(module), numbers) for module in modules]


def _seen(value: Any, numbers: bool) -> Any:
    match value:
        case Tensor():
            written = numbers and (object() if value.is_meta else value.is_inference() or value._version)
            return value.data_ptr(), value.dtype, value.device, written
        case dict():  # specdec's own hooks are those of a run, not of the model
            kept = {key: part for key, part in value.items() if not _ours(part)}
            return [(key, _seen(part, numbers)) for key, part in kept.items()]
        case list() | tuple():
            return [_seen(part, numbers) for part in value]
        case set():
            return frozenset(value)
        case None | bool() | int() | float() | str():
            return value
    return _Itself(value)


def _ours(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__module__.split(".")[0] == __package__


class _Itself:  # noqa: PLW1641 - nobody hashes it
    """Equal to what stands for the same object, while that lives."""

    def __init__(self, value: Any):
        try:
            self._get = ref(value)
        except TypeError:  # what cannot be referred to weakly is small: dtypes, devices, enumerations
            self._get = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._get() is not None and self._get() is other._get()
