"""Matrices of a model stored in fewer bits, and read so by its products on a CPU: see `specdec_kernels.reference.stored_linear`.

A layer stays the object that it is, and becomes a `StoredLinear` or `StoredEmbedding`: hooks, and drafters that share it, see no
difference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import specdec_kernels
from specdec.checks import wrong_kind
from specdec_kernels.reference import stored_linear as layout

Module = TypeVar("Module", bound=nn.Module)

_PART = 1 << 22  # numbers that are packed at a time
_LARGEST = 65504.0  # in float16


class Format(NamedTuple):
    """Functions of a way to store a matrix."""

    pack: Callable[[Tensor], tuple[Tensor, ...]]
    linear: Callable[..., Tensor]
    unpack: Callable[..., Tensor]


FORMATS = {
    "bf16": Format(layout.pack_bf16, specdec_kernels.linear_bf16, layout.unpack_bf16),
    "int8": Format(layout.pack_int8, specdec_kernels.linear_int8, layout.unpack_int8),
    "int4": Format(layout.pack_int4, specdec_kernels.linear_int4, layout.unpack_int4),
}


class StoredLinear(nn.Linear):
    """A linear layer whose matrix is stored in fewer bits.

    Attributes:
        stored_as: its format.
        dtype: of what it would hold and return as a plain layer.
        stored: integers or bfloat16.
        scales: of integers; None in bfloat16.
    """

    stored_as: str
    dtype: torch.dtype
    stored: Tensor
    scales: Tensor | None

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return (self.stored,) if self.scales is None else (self.stored, self.scales)

    @property
    def weight(self) -> Tensor:  # type: ignore[override] - a parameter of plain layers
        """[out, in]: the matrix, unpacked for each caller."""
        return self._unpacked(self.kept)[: self.out_features]

    def rows(self, ids: Tensor) -> Tensor:
        """[..., in]: rows of the matrix, for ids [...] int64."""
        return self._unpacked(layout.rows(ids.flatten(), *self.kept)).view(*ids.shape, self.in_features)

    def _unpacked(self, kept: tuple[Tensor, ...]) -> Tensor:
        return FORMATS[self.stored_as].unpack(*kept)[:, : self.in_features].to(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        if input.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"A layer stored in {self.stored_as} takes no gradients; train with the model as it was loaded, and store its "
                "weights then, or run this under torch.no_grad()."
            )
        product = FORMATS[self.stored_as].linear(input.float(), *self.kept, self.out_features).to(input.dtype)
        return product if self.bias is None else product + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move what is stored; a cast changes no more than `dtype`."""
        before = self.kept
        super()._apply(fn, recurse)
        for name, kept in zip(("stored", "scales"), before, strict=False):
            if (moved := getattr(self, name)).dtype != kept.dtype:
                setattr(self, name, kept.to(moved.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before[0].device)).dtype
        return self


class StoredEmbedding(nn.Embedding):
    """An embedding that reads rows of the matrix of a `StoredLinear`."""

    tied: tuple[StoredLinear]  # in a tuple, as it is no part of this module

    @property
    def dtype(self) -> torch.dtype:
        """Of what it returns."""
        return self.tied[0].dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[vocab, hidden]: the matrix, unpacked for each caller."""
        return self.tied[0].weight

    def rows(self, ids: Tensor) -> Tensor:
        """[..., hidden]: embeddings, for ids [...] int64, without what a subclass adds."""
        return self.tied[0].rows(ids)

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input)


def store_weights(model: Module, weights: str) -> Module:
    """Store the matrices of a model's `nn.Linear` layers in fewer bits, in place, one after the other; returns the model.

    Passes of 1 to 64 tokens on a CPU then take little longer than reading what is stored. An embedding that is tied to such a
    layer reads its rows there. All else stays as it is: other embeddings, norms, convolutions, experts that are no `nn.Linear`.
    The law of the model is that of these weights, and with integers of activations that are rounded in each product; drafting
    changes it no further. No parameter takes gradients any more. A layer may be stored by itself, so formats may be mixed: those stored already are left as they are.

    Args:
        model: in eval mode, on a CPU.
        weights: "bf16"; "int8": a scale for each output, activations rounded to 8 bits for each token; "int4": groups of 32 with
            a scale and a least value, activations rounded to 8 bits in each group, and the LM head as in "int8". Weights that
            come from a GGUF file in Q4_0 or Q4_1 are stored exactly by "int4".

    Raises:
        ValueError: the format is not known, the model is in training mode or not on a CPU, or there is nothing to store.
    """
    if not isinstance(model, nn.Module):
        raise wrong_kind("model", model, "pass a model of torch")
    if weights not in FORMATS:
        raise ValueError(f"weights={weights!r}: expected one of {', '.join(map(repr, FORMATS))}.")
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode, and stored weights take no gradients; call model.eval().")
    linears = (part for part in model.modules() if isinstance(part, nn.Linear))
    layers = [part for part in linears if not isinstance(part, StoredLinear) and part.weight.numel()]
    if not layers:
        raise ValueError(f"{_nothing_to_store(model)}: nothing is left to store in {weights}; load the model anew.")
    for layer in layers:
        _check(layer)
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


def is_stored(model: nn.Module) -> bool:
    """Whether some weights of the model are stored in fewer bits."""
    return any(isinstance(part, StoredLinear) for part in model.modules())


def weight_like(layer: Any) -> Any:
    """The weight of a layer. If it is stored: a tensor of its shape, dtype and device that takes no memory and holds no numbers."""
    if not isinstance(layer, (StoredLinear, StoredEmbedding)):
        return getattr(layer, "weight", None)
    kept = layer.tied[0] if isinstance(layer, StoredEmbedding) else layer
    nothing = torch.full((), torch.nan, dtype=kept.dtype, device=kept.stored.device)
    return nothing.expand(kept.out_features, kept.in_features)


def rows_of(layer: Any, ids: Tensor) -> Tensor:
    """[..., in]: rows of a layer's weight, for ids [...] int64."""
    return layer.rows(ids) if isinstance(layer, (StoredLinear, StoredEmbedding)) else layer.weight[ids]


def _check(layer: nn.Linear) -> None:
    weight = layer.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise ValueError(
            f"{layer} holds a {type(weight).__name__} of {weight.dtype}, quantised already; load the model without that, or "
            "decode with it as it is."
        )
    if weight.device.type != "cpu":
        raise ValueError(f"{layer} is on {weight.device}, and stored weights are for a CPU; move the model there: model.cpu().")
    least, most = weight.aminmax()
    if not max(-least, most) <= _LARGEST:
        raise ValueError(f"{layer} holds weights from {least} to {most}; stored are numbers up to {_LARGEST:.0f} in size.")


def _store(sharing: list[Any], weights: str) -> None:
    """Store the one matrix of linear layers, and of embeddings that are tied to them."""
    matrix = sharing[0].weight
    rows = max(_PART // matrix.shape[1] // layout.OUTPUTS, 1) * layout.OUTPUTS
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
    state = f"is stored in {', '.join(formats)} already" if formats else "has no nn.Linear"
    return f"{type(model).__name__} {state}"


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ValueError(
        "transformers loads no weights that are stored so; save the model before store_weights, and store them after loading, "
        "or save its state_dict() for a model whose weights are stored likewise."
    )
