"""Layers whose matrices are stored in fewer bits, and read so by their products.

`specdec_kernels.reference.stored_linear` says how.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils._pytree import tree_map_only

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


class _Here(threading.local):
    unrounded = False


_here = _Here()


@contextmanager
def unrounded() -> Iterator[None]:
    """Inside, in this thread, integers are multiplied with activations to the precision of float32.

    That takes thrice as long: what rounding takes away is multiplied too, twice over.
    """
    before, _here.unrounded = _here.unrounded, True
    try:
        yield
    finally:
        _here.unrounded = before


class StoredMatrix(Tensor):
    """The weight of a stored layer: a shape, a dtype and a device. Who reads its numbers gets them unpacked, for that alone.

    Linear products with it, and embeddings of ids, read what is stored instead. It cannot be written.
    """

    _layer: StoredLinear

    @staticmethod
    def __new__(cls, layer: StoredLinear) -> StoredMatrix:
        shape, device = (layer.out_features, layer.in_features), layer.stored_weight.device
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.stored_dtype, device=device)
        made._layer = layer
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("__setitem__", "__set__"):
            raise _not_writable(args[0])
        run = _linear if func is linear else func
        with torch._C.DisableTorchFunctionSubclass():
            return run(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args and isinstance(args[0], StoredMatrix) else None
        if first is not None and func._schema.is_mutable:
            raise _not_writable(first)
        if first is not None and func is torch.ops.aten.detach.default:
            return StoredMatrix(first._layer)
        if first is not None and func is torch.ops.aten.embedding.default:
            return first._layer.stored_rows(args[1])
        args, kwargs = tree_map_only(StoredMatrix, lambda matrix: matrix._layer.stored_numbers(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, StoredMatrix):
        return linear(input, weight, bias)
    product = weight._layer.stored_product(input)
    return product if bias is None else product + bias


def _not_writable(matrix: Any) -> ValueError:
    return ValueError(
        f"The weight of a layer stored in {matrix._layer.stored_as} cannot be written; change it before store_weights."
    )


class StoredLinear(nn.Linear):
    """A linear layer whose matrix is stored in fewer bits.

    All that it adds to a layer is named `stored_...`, as subclasses of `nn.Linear` may have names of their own.

    Attributes:
        stored_as: its format.
        stored_dtype: of what it would hold and return as a plain layer.
        stored_weight: integers or bfloat16.
        stored_scales: of integers; None in bfloat16.
    """

    stored_as: str
    stored_dtype: torch.dtype
    stored_weight: Tensor
    stored_scales: Tensor | None

    @property
    def stored_parts(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return (self.stored_weight,) if self.stored_scales is None else (self.stored_weight, self.stored_scales)

    @property
    def weight(self) -> Tensor:  # type: ignore[override] - a parameter of plain layers
        """[out, in]: the matrix, unpacked by who reads its numbers."""
        # torch.compile makes no such tensors; it leaves out what is unpacked and not read.
        return self.stored_numbers() if torch.compiler.is_compiling() else StoredMatrix(self)

    def stored_numbers(self) -> Tensor:
        """[out, in]: the matrix, unpacked for each caller."""
        return self._stored_unpacked(self.stored_parts)[: self.out_features]

    def stored_rows(self, ids: Tensor) -> Tensor:
        """[..., in]: rows of the matrix, for ids [...] int64; raises IndexError where there is no such row."""
        embedding(
            ids, torch.zeros(1, 1, device=ids.device).expand(self.out_features, 1)
        )  # for its error: tiles are longer
        return self._stored_unpacked(layout.rows(ids.flatten(), *self.stored_parts)).view(*ids.shape, self.in_features)

    def stored_product(self, input: Tensor) -> Tensor:
        """[..., out]: input [..., in] times the matrix."""
        if input.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"A layer stored in {self.stored_as} takes no gradients; train with the model as it was loaded, and store its "
                "weights then, or run this under torch.no_grad()."
            )
        x = input.float()
        product = self._stored_product(x)
        if not torch.compiler.is_compiling() and _here.unrounded and self.stored_scales is not None:
            for _ in range(2):
                x = x - layout.rounded(x)[..., : self.in_features]
                product = product + self._stored_product(x)
        return product.to(input.dtype)

    def _stored_product(self, x: Tensor) -> Tensor:
        return FORMATS[self.stored_as].linear(x, *self.stored_parts, self.out_features)

    def _stored_unpacked(self, parts: tuple[Tensor, ...]) -> Tensor:
        return FORMATS[self.stored_as].unpack(*parts)[:, : self.in_features].to(self.stored_dtype)

    def forward(self, input: Tensor) -> Tensor:
        product = self.stored_product(input)
        return product if self.bias is None else product + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move what is stored; a cast changes no more than the dtype."""
        before = self.stored_parts
        super()._apply(fn, recurse)
        for name, kept in zip(("stored_weight", "stored_scales"), before, strict=False):
            if (moved := getattr(self, name)).dtype != kept.dtype:
                setattr(self, name, kept.to(moved.device))
        self.stored_dtype = fn(torch.empty(0, dtype=self.stored_dtype, device=before[0].device)).dtype
        return self


class StoredEmbedding(nn.Embedding):
    """An embedding that reads rows of the matrix of a `StoredLinear`."""

    stored_in: tuple[StoredLinear]  # in a tuple, as it is no part of this module

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[vocab, hidden]: the matrix, unpacked by who reads its numbers."""
        return self.stored_in[0].weight

    def stored_rows(self, ids: Tensor) -> Tensor:
        """[..., hidden]: embeddings, for ids [...] int64, without what a subclass adds."""
        return self.stored_in[0].stored_rows(ids)

    def forward(self, input: Tensor) -> Tensor:
        return self.stored_rows(input)


def is_stored(model: nn.Module) -> bool:
    """Whether some weights of the model are stored in fewer bits."""
    return any(isinstance(part, StoredLinear) for part in model.modules())


def rows_of(layer: Any, ids: Tensor) -> Tensor:
    """[..., in]: rows of a layer's weight, for ids [...] int64."""
    return (
        layer.stored_rows(ids) if isinstance(layer, (StoredLinear, StoredEmbedding)) else embedding(ids, layer.weight)
    )
