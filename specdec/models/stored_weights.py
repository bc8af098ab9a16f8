"""The matrices of a model stored as they are read fastest, in place.

A layer stays the object that it is, and changes its class: hooks, and drafters that share it, see no difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from specdec.models.storable import PLAIN, by_matrix, check_model, check_sizes
from specdec.models.stored_layers import FORMATS, StoredEmbedding, StoredLinear, is_stored
from specdec_kernels.cpu.large_pages import keep_in_large_pages
from specdec_kernels.reference.stored_linear import OUTPUTS

Module = TypeVar("Module", bound=nn.Module)

_PART = 1 << 22  # numbers that are packed at a time
_OF_PLAIN_WEIGHTS = ("save_pretrained", "resize_token_embeddings", "tie_weights")


def store_weights(model: Module, weights: str) -> Module:
    """Store the matrices of a model's `nn.Linear` layers as a CPU reads them fastest, in place, one after the other.

    Passes of a few tokens on a CPU then take little longer than reading what is stored, in large pages of memory where the
    system has them. "plain" is that alone: the model stays what it was, with its matrices in memory of their own. A GPU reads
    integers so too, by kernels that were never timed: what they save for certain is room. An embedding that is tied to such a
    layer reads its rows there. All else stays as it is: other embeddings, norms, convolutions, experts that are no `nn.Linear`,
    and adapters of PEFT that are not merged.

    In fewer bits, the law of the model is from then on that of these weights, and of activations that are rounded in each
    product with integers; drafting changes it no further. No parameter takes gradients any more. A layer may be stored by
    itself, so formats may be mixed: what is stored already is left as it is.

    Args:
        model: in eval mode, on a CPU, or for integers on CUDA devices.
        weights: "plain": as they are; "bf16"; "int8": a scale for each output; "int4": groups of 32 inputs with a scale and a
            least value, and the LM head as in "int8". For products with integers, activations are rounded to 8 bits in groups
            of 32. Weights of a GGUF file in Q4_0, and in Q4_1 if it was made without an importance matrix, stay exactly as they
            are in "int4".

    On CPUs without AVX-512, or without its VNNI for integers, it warns that products are slower.

    Returns:
        The model.

    Raises:
        ValueError: before anything is stored: the format is not known, the model is in training mode or elsewhere, a layer
            does not hold plain weights or holds some that the format has no numbers for, or there is nothing to store.
    """
    check_model(model, weights)
    heads = [part.get_output_embeddings() for part in model.modules() if isinstance(part, PreTrainedModel)]
    stored = [
        (sharing, "int8" if weights == "int4" and any(head in sharing for head in heads) else weights)
        for sharing in by_matrix(model, weights)
    ]
    if not stored:
        raise ValueError(f"{_nothing_to_store(model)} Nothing was stored in {weights}.")
    for sharing, found in stored:
        check_sizes(sharing[0], found)
    if any(sharing[0].weight.device.type == "cpu" for sharing, _ in stored) and not _is_fast(weights):
        warnings.warn(
            f"This CPU has no AVX-512 with VNNI, which products in {weights} are made for: they are right, and slower.",
            stacklevel=2,
        )
    if weights == PLAIN:
        return _moved(model, [sharing[0].weight for sharing, _ in stored])
    _guard_transformers()
    for sharing, found in stored:
        _store(sharing, found)
    keep_in_large_pages(kept for sharing, _ in stored for kept in sharing[0].state_dict().values())
    return model.requires_grad_(False)


def _is_fast(weights: str) -> bool:
    """Whether this CPU has the instructions that products in the format are made for."""
    floats, integers = torch.cpu._is_avx512_supported(), torch.cpu._is_vnni_supported()
    return {PLAIN: True, "bf16": floats}.get(weights, floats and integers)


def _moved(model: Module, matrices: Sequence[nn.Parameter]) -> Module:
    """The model, whose matrices are the same and lie in memory that is no file's."""
    for matrix in matrices:
        matrix.data = matrix.data.clone()
    keep_in_large_pages(matrices)
    return model


def _store(sharing: list[Any], weights: str) -> None:
    """Store the one matrix of linear layers, and of embeddings that are tied to them."""
    matrix = sharing[0].weight
    rows = max(_PART // matrix.shape[1] // OUTPUTS, 1) * OUTPUTS
    with torch.no_grad():
        parts = [FORMATS[weights].pack(part) for part in matrix.split(rows)]
    kept = [torch.cat(each) for each in zip(*parts, strict=True)]
    linears = [part for part in sharing if isinstance(part, nn.Linear)]
    for part in sharing:
        if part in linears:
            part.__class__ = _class(type(part), StoredLinear)
            part.stored_as, part.stored_dtype = weights, matrix.dtype
            part.register_buffer("stored_weight", kept[0])
            part.register_buffer("stored_scales", kept[1] if len(kept) > 1 else None)
        else:
            part.__class__ = _class(type(part), StoredEmbedding)
            part.stored_in = (linears[0],)
        del part._parameters["weight"]


@cache
def _class(found: type, stored: type) -> type:
    """The class of a layer of class `found` that is stored: where that calls its superclass, it comes to `stored`."""
    if found in (nn.Linear, nn.Embedding):
        return stored
    return type(f"Stored{found.__name__}", (found, stored), {"__reduce_ex__": _reduce})


def _reduce(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """For copies and pickles, which find no class that was made while running."""
    _, _, *state = object.__reduce_ex__(layer, 2)
    return _empty, type(layer).__bases__, *state


def _empty(found: type, stored: type) -> Any:
    made: Any = _class(found, stored)
    return made.__new__(made)


def _nothing_to_store(model: nn.Module) -> str:
    formats = sorted({part.stored_as for part in model.modules() if isinstance(part, StoredLinear)})
    state = f"is stored in {', '.join(formats)} already; load it anew." if formats else "has no nn.Linear."
    return f"{type(model).__name__} {state}"


@cache
def _guard_transformers() -> None:
    """From now on, what transformers does with plain weights is refused to models that hold stored ones.

    For all of its models: parts of one are stored by themselves too.
    """
    for name in _OF_PLAIN_WEIGHTS:
        setattr(PreTrainedModel, name, _of_plain_weights(getattr(PreTrainedModel, name)))


def _of_plain_weights(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def checked(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if is_stored(self):
            raise ValueError(
                f"{type(self).__name__}.{method.__name__}: transformers knows no weights that are stored so; call it before "
                "store_weights, and to keep the model, save its state_dict() for one whose weights are stored likewise."
            )
        return method(self, *args, **kwargs)

    return checked
