"""Whether a model still computes what it did: everything its modules hold is compared, whatever it means.

That is weights, submodules, hooks, switches and factors (PEFT keeps its own as plain attributes of layers). It is computed
before every run, which may be short: one flat pass, a few microseconds per module.
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
    """A value that equals an earlier one if nothing visible has changed in between. It keeps nothing alive.

    Args:
        models: the models; a module that is in several counts once.
        numbers: whether the contents of tensors count, or only their place in memory. Changes are seen by torch's count of
            writes. Tensors without such a count (inference tensors, weights that accelerate keeps elsewhere) equal nothing.
    """
    found: list[Any] = []  # names, each followed by what stands for its value
    modules = dict.fromkeys(module for model in models for module in model.modules())
    groups: list[tuple[Any, Any]] = [("", vars(module)) for module in modules]  # (name, group)
    met: set[int] = set()  # ids of nested groups, as a group may hold itself
    for title, group in groups:  # the list grows while it is walked
        before = len(found)
        # `list`, as other threads may add hooks meanwhile
        for name, value in list(group.items() if isinstance(group, dict) else enumerate(group)):
            if type(value) in _PLAIN:
                found += name, value
            elif isinstance(value, _GROUPS):
                if id(value) in met:
                    found += name, type(value)
                # Most modules have a dozen empty dicts of hooks. Flags of hooks change with hooks, those of a pass included.
                elif value and not str(name).endswith("_with_kwargs"):
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
    """How often a tensor has been written to; an object that equals nothing if torch does not count that."""
    return object() if tensor.is_meta or tensor.is_inference() else tensor._version


def _lasting(value: Any) -> Any:
    """The value without what runs in progress have put in its place; None if nothing is left."""
    ours = isinstance(value, FunctionType) and value.__module__.split(".")[0] == "specdec"
    return getattr(value, "__wrapped__", None) if ours else value


class _Itself:  # noqa: PLW1641 - nobody hashes it
    """Equal to another one of the same object, while that is alive."""

    __slots__ = ("_get",)

    def __init__(self, value: Any):
        try:
            self._get = ref(value)
        except TypeError:  # objects without weak references are small: dtypes, devices, enumerations
            self._get = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._get() is not None and self._get() is other._get()
