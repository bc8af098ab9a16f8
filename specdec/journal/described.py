"""Objects in words that another process finds too: what a journal says of a job's parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from inspect import signature
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from specdec.models.digest import digest, sums, weights_digest
from specdec.processors import memory_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OBJECT = re.compile(r"<(?:[\w<>]+\.)*(\w+) object at 0x[0-9a-fA-F]+>")  # what `object.__repr__` says
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LONG = 300  # characters of a description; of a longer one its hash is kept


def described(part: Any, public: bool = False) -> str:
    """What `repr` says of it, without addresses in memory.

    Of an object of a class without a `__repr__` of its own: the class and its attributes, what functions do and remember, and
    what tensors hold. Give a class a `__repr__` if that differs from process to process, or does not say what decides the
    texts.

    Args:
        public: whether only attributes count that are numbers, text or lists of such, and whose names do not begin with "_".
    """
    text = _shown(part, public)
    return text if len(text) <= _LONG else f"{text[:_LONG]}... {digest(text.encode())}"


def _shown(part: Any, public: bool) -> str:
    if type(part).__repr__ is not object.__repr__:
        return _said(part, frozenset())
    values = _decisive(part)
    if public:
        values = {name: value for name, value in values.items() if not name.startswith("_") and _is_plain(value)}
    inside = frozenset([id(part)])
    return f"{type(part).__name__}({', '.join(f'{name}={_said(values[name], inside)}' for name in sorted(values))})"


def _said(part: Any, inside: frozenset[int]) -> str:
    """`inside`: the ids of all that this is a part of, as parts may refer to each other."""
    if isinstance(part, _PLAIN):
        return repr(part)
    if id(part) in inside:
        return "..."
    inside = inside | {id(part)}

    def listed(parts: Iterable[Any]) -> list[str]:
        return [_said(each, inside) for each in parts]

    if isinstance(part, np.ndarray) and part.dtype.kind in "biufc":
        part = torch.from_numpy(np.ascontiguousarray(part))
    if isinstance(part, Tensor):
        return f"{list(part.shape)} {part.dtype} {sums(part)}"
    if isinstance(part, Mapping):
        return f"{{{', '.join(sorted(map(': '.join, zip(listed(part), listed(part.values()), strict=True))))}}}"
    if isinstance(part, Set):
        return f"{{{', '.join(sorted(listed(part)))}}}"
    if isinstance(part, (list, tuple, range)):
        return f"[{', '.join(listed(part))}]"
    if isinstance(part, FunctionType):
        return f"{part.__qualname__}({', '.join(listed([part.__code__, *memory_of(part)]))})"
    if isinstance(part, CodeType):
        return digest(part.co_code, ", ".join(listed([part.co_consts, part.co_names])).encode())
    if isinstance(part, MethodType):
        return f"{_said(part.__self__, inside)}.{part.__name__}"
    if isinstance(part, nn.Module):
        return f"{type(part).__name__}({weights_digest(part)})"
    if isinstance(part, PreTrainedTokenizerBase):
        return f"{type(part).__name__}({digest(repr(sorted(part.get_vocab().items())).encode())})"
    if type(part).__repr__ is object.__repr__ and hasattr(part, "__dict__"):
        return f"{type(part).__name__}({_said(_decisive(part), inside)})"
    return _ADDRESS.sub("", _OBJECT.sub(r"\1()", repr(part)))


def _decisive(part: Any) -> dict[str, Any]:
    """Attributes; of transformers' own classes only those that are arguments, as others are worked out at the first call."""
    if not type(part).__module__.startswith("transformers."):
        return vars(part)
    made_of = {name for cls in type(part).__mro__ for name in signature(cls.__init__).parameters}
    return {name: value for name, value in vars(part).items() if name.lstrip("_") in made_of}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, _PLAIN)
