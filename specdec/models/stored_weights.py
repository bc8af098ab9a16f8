"""The matrices of a model stored in fewer bits, in place.

A layer stays the object that it is, and changes its class: hooks, and drafters that share it, see no difference.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

import specdec_kernels
from specdec.checks import wrong_kind
from specdec.models.stored_layers import FORMATS, StoredEmbedding, StoredLinear
from specdec_kernels.reference.stored_linear import OUTPUTS

Module = TypeVar("Module", bound=nn.Module)

_PART = 1 << 22  # numbers that are packed at a time
_LARGEST = 65504.0  # in float16


def store_weights(model: Module, weights: str) -> Module:
    """Store the matrices of a model's `nn.Linear` layers in fewer bits, in place, one after the other; returns the model.

    Passes of a few tokens on a CPU then take little longer than reading what is stored. A GPU reads integers so too, by kernels
    that were never timed: what they save for certain is room. An embedding that is tied to such a layer reads its rows there.
    All else stays as it is: other embeddings, norms, convolutions, experts that are no `nn.Linear`.

    The law of the model is from then on that of these weights, and of activations that are rounded in each product with
    integers; drafting changes it no further. No parameter takes gradients any more. A layer may be stored by itself, so formats
    may be mixed: what is stored already is left as it is.

    Args:
        model: in eval mode, on a CPU or CUDA devices.
        weights: "bf16", for a CPU; "int8": a scale for each output; "int4": groups of 32 inputs with a scale and a least
            value, and the LM head as in "int8". For products with integers, activations are rounded to 8 bits in groups of 32.
            Weights on a grid of GGUF's Q4_0 or Q4_1, as those of such a file are, stay exactly as they are in "int4".

    On CPUs without AVX-512, or without its VNNI for integers, it warns that products are slower.

    Raises:
        ValueError: the format is not known, the model is in training mode or on another device, or there is nothing to store.
    """
    if not isinstance(model, nn.Module):
        raise wrong_kind("model", model, "pass a model of torch")
    if weights not in FORMATS:
        raise ValueError(f"weights={weights!r}: expected one of {', '.join(map(repr, FORMATS))}.")
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, and stored weights take no gradients; call model.eval()."
        )
    linears = (part for part in model.modules() if isinstance(part, nn.Linear))
    layers = [part for part in linears if not isinstance(part, StoredLinear) and part.weight.numel()]
    if not layers:
        raise ValueError(f"{_nothing_to_store(model)} Nothing was stored in {weights}.")
    for layer in layers:
        _check(layer, weights)
    if any(layer.weight.device.type == "cpu" for layer in layers) and not _is_fast(weights):
        warnings.warn(
            f"This CPU has no AVX-512 with VNNI, which products in {weights} are made for: they are right, and slower.",
            stacklevel=2,
        )
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    by_matrix: dict[int, list[Any]] = {id(layer.weight): [] for layer in layers}
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)) and id(part._parameters.get("weight")) in by_matrix:
            by_matrix[id(part.weight)].append(part)
    for sharing in by_matrix.values():
        _store(sharing, "int8" if weights == "int4" and head in sharing else weights)
    if isinstance(model, PreTrainedModel):
        vars(model)["save_pretrained"] = _refuse_to_save
    return model.requires_grad_(False)


def _is_fast(weights: str) -> bool:
    return torch.cpu._is_avx512_supported() and (weights == "bf16" or torch.cpu._is_vnni_supported())


def _check(layer: nn.Linear, weights: str) -> None:
    weight = layer.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise ValueError(
            f"{layer} holds a {type(weight).__name__} of {weight.dtype}, quantised already; load the model without that, or "
            "decode with it as it is."
        )
    if weight.device.type not in ("cpu", *(specdec_kernels.DEVICES if weights != "bf16" else ())):
        cure = "cast it, model.bfloat16(), or " if weights == "bf16" else ""
        raise ValueError(f"{layer} is on {weight.device}, where nothing reads {weights}; {cure}move it: model.cpu().")
    least, most = weight.aminmax()
    if not max(-least, most) <= _LARGEST:
        raise ValueError(
            f"{layer} holds weights from {least} to {most}; stored are numbers up to {_LARGEST:.0f} in size."
        )


def _store(sharing: list[Any], weights: str) -> None:
    """Store the one matrix of linear layers, and of embeddings that are tied to them."""
    matrix = sharing[0].weight
    rows = max(_PART // matrix.shape[1] // OUTPUTS, 1) * OUTPUTS
    with torch.no_grad():
        parts = [FORMATS[weights].pack(part) for part in matrix.split(rows)]
    kept = [torch.cat(each) for each in zip(*parts, strict=True)]
    linears = [part for part in sharing if isinstance(part, nn.Linear)]
    for part in sharing:
        del part._parameters["weight"]
        if part in linears:
            part.__class__ = _class(type(part), StoredLinear)
            part.stored_as, part.dtype = weights, matrix.dtype
            part.register_buffer("stored", kept[0])
            part.register_buffer("scales", kept[1] if len(kept) > 1 else None)
        else:
            part.__class__ = _class(type(part), StoredEmbedding)
            part.tied = (linears[0],)


@cache
def _class(found: type, stored: type) -> type:
    """The class of a layer of class `found` that is stored: where that calls its superclass, it comes to `stored`."""
    return stored if found in (nn.Linear, nn.Embedding) else type(f"Stored{found.__name__}", (found, stored), {})


def _nothing_to_store(model: nn.Module) -> str:
    formats = sorted({part.stored_as for part in model.modules() if isinstance(part, StoredLinear)})
    state = f"is stored in {', '.join(formats)} already; load it anew." if formats else "has no nn.Linear."
    return f"{type(model).__name__} {state}"


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ValueError(
        "transformers loads no weights that are stored so; save the model before store_weights, and store them after loading, "
        "or save its state_dict() for a model whose weights are stored likewise."
    )
