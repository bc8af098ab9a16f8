"""What of a model can be stored otherwise; the rest is refused before anything is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import specdec_kernels
from specdec.checks import wrong_kind
from specdec.models.stored_layers import FORMATS, StoredLinear

# The format of weights that stay as they are.
PLAIN = "plain"
_LARGEST = torch.finfo(torch.bfloat16).max
# Sizes of the largest number of a matrix. Scales of int4 are in float16, and small ones lose their digits there.
_SIZES = {PLAIN: (0.0, math.inf), "bf16": (0.0, _LARGEST), "int8": (0.0, _LARGEST), "int4": (2.0**-14, 65504.0)}


def check_model(model: Any, weights: str) -> None:
    if not isinstance(model, nn.Module):
        raise wrong_kind("model", model, "pass a model of torch")
    if weights not in (known := (PLAIN, *FORMATS)):
        raise ValueError(f"weights={weights!r}: expected one of {', '.join(map(repr, known))}.")
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, and stored weights take no gradients; call model.eval()."
        )


def by_matrix(model: nn.Module, weights: str) -> list[list[Any]]:
    """What is to be stored: the linear layers, and embeddings tied to them, of each matrix."""
    adapters = {*_adapters(model)}
    parts = [part for part in model.modules() if part not in adapters and not isinstance(part, StoredLinear)]
    linears = [part for part in parts if isinstance(part, nn.Linear) and part.weight.numel()]
    for layer in linears:
        _check(layer, weights)
    found: dict[int, list[Any]] = {id(layer.weight): [] for layer in linears}
    for part in parts:
        if isinstance(part, (nn.Linear, nn.Embedding)) and id(part._parameters.get("weight")) in found:
            found[id(part.weight)].append(part)
    return [*found.values()]


def _adapters(model: nn.Module) -> Iterator[nn.Module]:
    """What PEFT's layers add to those that they wrap: it saves the former without the latter."""
    for part in model.modules():
        held = (getattr(part, name, None) for name in getattr(part, "adapter_layer_names", ()))
        for adapter in held:
            yield from adapter.modules() if isinstance(adapter, nn.Module) else ()


def _check(layer: nn.Linear, weights: str) -> None:
    weight = layer.weight
    if layer._parameters.get("weight") is not weight or isinstance(getattr(type(layer), "weight", None), property):
        raise ValueError(
            f"{layer} computes its weight from others; remove its parametrization, or load the merged model."
        )
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2:
        raise ValueError(
            f"{layer} holds a {type(weight).__name__} of {weight.dtype}, quantised already; load the model without that, or "
            "decode with it as it is."
        )
    if weight.device.type not in ("cpu", *(specdec_kernels.DEVICES if weights in ("int8", "int4") else ())):
        cure = "cast it, model.bfloat16(), or " if weights == "bf16" else ""
        raise ValueError(f"{layer} is on {weight.device}, where nothing reads {weights}; {cure}move it: model.cpu().")
    if taken := [name for name in dir(layer) if name.startswith("stored_")]:
        raise ValueError(f"{layer} has {', '.join(taken)}, as stored layers name what they add; give it another name.")


def check_sizes(layer: Any, weights: str) -> None:
    with torch.no_grad():
        least, most = map(float, layer.weight.aminmax())
    size, (smallest, largest) = max(-least, most), _SIZES[weights]
    if not (size == 0 or smallest <= size <= largest):
        cure = (
            " Store it in int8 first: store_weights(layer, 'int8')." if weights == "int4" and size <= _LARGEST else ""
        )
        raise ValueError(
            f"{layer} holds weights from {least:.1e} to {most:.1e}; the largest in size must be from {smallest:.1e} to "
            f"{largest:.1e} in {weights}.{cure}"
        )
