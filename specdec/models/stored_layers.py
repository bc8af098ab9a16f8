"""Layers whose matrices are stored in fewer bits, and read so by their products.

`specdec_kernels.reference.stored_linear` says how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

import specdec_kernels
from specdec_kernels.reference import stored_linear as layout


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


def is_stored(model: nn.Module) -> bool:
    """Whether some weights of the model are stored in fewer bits."""
    return any(isinstance(part, StoredLinear) for part in model.modules())


def weight_like(layer: Any) -> Any:
    """The weight of a layer; if it is stored, a tensor of its shape, dtype and device without memory for numbers."""
    if not isinstance(layer, (StoredLinear, StoredEmbedding)):
        return getattr(layer, "weight", None)
    kept = layer.tied[0] if isinstance(layer, StoredEmbedding) else layer
    nothing = torch.full((), torch.nan, dtype=kept.dtype, device=kept.stored.device)
    return nothing.expand(kept.out_features, kept.in_features)


def rows_of(layer: Any, ids: Tensor) -> Tensor:
    """[..., in]: rows of a layer's weight, for ids [...] int64."""
    return layer.rows(ids) if isinstance(layer, (StoredLinear, StoredEmbedding)) else embedding(ids, layer.weight)
