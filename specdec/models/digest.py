"""Short hashes of models that another process computes too, if the model is the same: for records that outlive a process.

See `fingerprint` for changes within one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_COLUMNS = 1021
# What a config says of its origin; with fields whose names begin with "_", as the path that a model was loaded from.
_ORIGIN = ("transformers_version", "architectures", "dtype", "torch_dtype")


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits for these bytes, in this order."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()[:16]


def config_digest(model: nn.Module) -> str:
    """A hash of all that the config says of the computation; of the class alone if there is no config."""
    as_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return digest(type(model).__name__.encode(), plain_json(None if as_dict is None else as_dict()))


def plain_json(config: Any) -> bytes:
    """A config in plain values as JSON, without what it says of its origin."""

    def computes(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {str(k): computes(v) for k, v in value.items() if not str(k).startswith("_") and k not in _ORIGIN}
            return dict(sorted(kept.items()))
        return [computes(part) for part in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(computes(config), default=lambda value: type(value).__name__).encode()


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and values of all that a model saves.

    Training changes it, also of a few rows of an embedding, and so does a switch of adapters (PEFT). Not seen are hooks, and
    values that accelerate keeps elsewhere. It reads all weights once.
    """
    return digest(*_saved(model), *_adapters(model))


def _saved(model: nn.Module) -> Iterable[bytes]:
    for name, value in model.state_dict().items():
        yield name.encode()
        if isinstance(value, Tensor):
            yield f"{list(value.shape)} {value.dtype} {0 if value.is_meta else sums(value)}".encode()


def sums(tensor: Tensor) -> list[int]:
    """The bits of all values, summed as integers, modulo 2**64: in columns, and these weighted, so that places count."""
    bits = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    words = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(torch.int64)
    rows = -(-len(words) // _COLUMNS)
    columns = torch.nn.functional.pad(words, (0, -len(words) % _COLUMNS)).view(rows, _COLUMNS).sum(0)
    weights = torch.arange(1, 2 * _COLUMNS, 2, device=columns.device)
    return [int(columns.sum()), int((columns * weights * weights).sum())]


def _adapters(model: nn.Module) -> Iterable[bytes]:
    """Which adapters are at work and how strongly, layer by layer, as PEFT notes it."""
    for name, module in model.named_modules():
        if isinstance(scaling := getattr(module, "scaling", None), Mapping):
            at_work = getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None)
            yield repr((name, scaling, at_work)).encode()
