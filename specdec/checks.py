"""Arguments of the wrong type or out of range are refused with the value, the limit and the cure.

Numbers may be Python's, NumPy's or 0-d tensors. A bool is not a number here, and a float is not a count, even 3.0.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterable, Mapping, Set
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

_MOST = 2**31 - 1  # no count here is larger
_CONVERSIONS = (
    (PreTrainedModel, "wrap a draft model: ModelDrafter(model)"),
    (GenerationConfig, "convert it: Sampling.from_generation_config(config)"),
)


def as_int(name: str, value: Any, least: int = -_MOST, most: int = _MOST, cure: str = "") -> int:
    """`value` as a Python integer from `least` to `most`; else ValueError, with the cure."""
    number, cure = _plain(value), cure and f"; {cure}"
    if not _is_number(number, Integral):
        whole = isinstance(number, float) and number.is_integer()
        limit = f" >= {least}" if least > -_MOST else ""
        raise ValueError(
            f"{name}={brief(value)}: must be an integer{limit}, such as {int(number) if whole else max(least, 1)}{cure}."
        )
    if not least <= number <= most:
        limit = f">= {least}" if number < least else f"<= {most}"
        raise ValueError(f"{name}={brief(value)}: must be {limit}{cure}.")
    return int(number)


def as_ints(name: str, values: Any, least: int = -_MOST, most: int = _MOST, cure: str = "") -> tuple[int, ...]:
    """A sequence of integers from `least` to `most`, of any library, as Python integers."""
    given = as_tuple(name, values, "integers", cure)
    return tuple(as_int(f"{name}[{i}]", value, least, most, cure) for i, value in enumerate(given))


def as_float(name: str, value: Any, interval: str = "(-inf, inf)", cure: str = "") -> float:
    """`value` as a Python float inside `interval`, written as in mathematics: "(0, 1]" excludes 0 and includes 1."""
    number, cure = _plain(value), cure and f"; {cure}"
    if not _is_number(number, Real):
        raise ValueError(f"{name}={brief(value)}: must be a number in {interval}{cure}.")
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below and abs(number) <= sys.float_info.max):  # Python compares integers of any size exactly
        raise ValueError(f"{name}={brief(value)}: must be in {interval}{cure}.")
    return float(number)


def as_tuple(name: str, values: Any, of: str, cure: str = "") -> tuple[Any, ...]:
    """A sequence as a tuple. Text, sets and mappings are refused."""
    if hasattr(values, "tolist"):
        values = values.tolist()  # a tensor or an array
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={brief(values)}: must be a sequence of {of}{cure and f'; {cure}'}.")
    return tuple(values)


def as_seed(seed: Any) -> int:
    """A seed of 64 bits, with or without a sign."""
    return as_int("seed", seed, -(2**63), 2**64 - 1)


def as_parents(parents: Any) -> tuple[int, ...]:
    """The parents of a tree's nodes: -1 for the root, and for each node after it the index of an earlier one."""
    cure = "must be -1 and then, for each node, the index of an earlier one"
    given = as_ints("parents", parents, cure=cure)
    if given[:1] != (-1,) or not all(0 <= parent < node for node, parent in enumerate(given[1:], start=1)):
        raise ValueError(f"parents={brief(list(given))}: {cure}.")
    return given


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], cure: str = "") -> None:
    """Raise ValueError, with the cure, unless `value` is a `kind`."""
    if isinstance(value, kind):
        return
    if isinstance(value, type) and not cure:
        raise ValueError(f"{name} is the class {value.__name__}; pass an instance, {value.__name__}(...).")
    wanted = kind if isinstance(kind, type) else kind[0]
    cures = (text for other, text in _CONVERSIONS if isinstance(value, other))
    raise wrong_kind(name, value, cure or next(cures, f"pass a specdec {wanted.__name__}"))


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={brief(value)}: must be True or False.")


def wrong_kind(name: str, value: Any, cure: str) -> ValueError:
    """The error for a value of the wrong kind."""
    return ValueError(f"{name} is a {type(value).__name__}; {cure}. Got {brief(value)}.")


def put(of: Any, **values: Any) -> None:
    """Set attributes, of frozen dataclasses too."""
    for name, value in values.items():
        object.__setattr__(of, name, value)


def put_size(of: Any) -> None:
    """Check the `nodes`, `depth` and `width` of a policy or a drafter, and make them Python integers."""
    cure = "a draft has nodes >= 2, depth >= 1 and width >= 1; use drafter=None to draft nothing"
    least = {"nodes": 2, "depth": 1, "width": 1}
    put(of, **{name: as_int(name, getattr(of, name), least[name], cure=cure) for name in least})


def brief(value: Any) -> str:
    """`value` as a message shows it: on one line, and cut where it is long."""
    return " ".join(reprlib.repr(value).split())


def check_callable(name: str, value: Any, cure: str) -> None:
    """Raise ValueError, with the cure, unless `value` can be called."""
    if not callable(value):
        raise wrong_kind(name, value, cure)


def check_logits(
    whose: str, logits: Any, axes: str, shape: tuple[int, ...], device: torch.device | None = None
) -> None:
    """Raise ValueError unless these are logits of this shape on this device. It does not wait for the device."""
    check_kind(f"what {whose} returned", logits, Tensor, f"return a tensor {axes} = {list(shape)}")
    if logits.shape != shape:
        raise ValueError(f"{whose} returned {list(logits.shape)}, not {axes} = {list(shape)}.")
    if not logits.is_floating_point():
        raise ValueError(
            f"{whose} returned {logits.dtype}; logits are floating-point numbers: return float32, or the model's dtype."
        )
    if device is not None and logits.device != device:
        raise ValueError(f"{whose} returned logits on {logits.device}; return them on {device}, where the text is.")


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A 0-d array or tensor as a Python number, and anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value
