"""The ops that are for a CPU, in C++: one library, compiled when the first of them is run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import torch

SOURCES = ("vectors.h", "linear.cpp", "stored_linear.cpp", "attention.cpp", "ops.cpp")


@cache
def load(*macros: str) -> None:
    """Compiled for this machine as torch.compile compiles its own kernels, and kept where it keeps those."""
    from torch._inductor.codecache import CppCodeCache

    sources = [files(__name__).joinpath(name).read_text("utf-8") for name in SOURCES]
    fused = "-ffp-contract=fast"  # products into sums, which torch leaves apart in its own
    CppCodeCache.load("\n".join([*macros, *sources]), extra_flags=(fused,))


@cache
def can_load() -> bool:
    """Whether the ops can be compiled here. Says once why they cannot: most likely there is no C++ compiler."""
    try:
        load()
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"The CPU's own products and attention cannot be compiled, and torch's are used: {reason}", stacklevel=2
        )
        return False
    return True


def define(name: str, schema: str, reference: Callable[..., Any]) -> Any:
    """The op `specdec::name`, whose kernel the library brings: what runs it first, compiled code too, loads that.

    Where there is no C++ compiler, the op is its reference.
    """
    tags = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order
    torch.library.define(f"specdec::{name}", schema, tags=tags)
    op = getattr(torch.ops.specdec, name).default

    @torch.library.impl(f"specdec::{name}", "default")  # what runs where there is no kernel for the device
    def first(*args: Any) -> Any:
        device = args[0].device
        if device.type != "cpu":
            raise ValueError(f"specdec::{name} is for a CPU, not {device}.")
        return op(*args) if can_load() else reference(*args)

    return op
