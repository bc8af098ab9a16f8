"""The ops for a CPU as other machines compile them."""

from functools import cache
from typing import Any

import torch

from specdec_kernels.cpu import load


def with_fewer_registers(name: str) -> Any:
    """`specdec::name` compiled without AVX-512."""
    _load()
    return getattr(torch.ops.specdec_without_avx512, name).default


@cache
def _load() -> None:
    for name in ("linear", "linear_bf16", "linear_int8", "linear_int4", "attention"):
        schema = str(getattr(torch.ops.specdec, name).default._schema)
        torch.library.define(f"specdec_without_avx512::{name}", schema[schema.index("(") :])
    load("#undef __AVX512F__", "#define specdec specdec_without_avx512")
