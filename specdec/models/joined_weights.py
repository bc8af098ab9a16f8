"""Matrices that multiply the same input laid one behind the other, in place: their products can be one."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from specdec.models.ready import check_ready, rows_of
from specdec_kernels.joined_linear import together

Model = TypeVar("Model", bound=PreTrainedModel)

_ALONE = 2  # uses of a storage: by its tensor, and by who counts them


def join_weights(model: Model) -> Model:
    """Lay matrices of a model that multiply the same input one behind the other, in place; returns the model.

    They are those of queries, keys and values, and of both halves of most MLPs: a forward pass over a few tokens shows which
    layers read the same tensor. On a GPU, compiled forward passes (`Graphs(compile=True)`) then compute each group in one
    product: four for a layer of Llama in place of seven, and none of them small. Elsewhere nothing gets faster or slower.

    Parameters stay the objects that they are, with the numbers that they have, and each keeps a storage of its own: state
    dicts, files, optimizers, hooks and layers that share them see no difference. The memory of a group is free once none of its
    weights is there. One group at a time exists twice. What moves, casts or copies a model, as `model.to(...)` does, takes them
    apart again, which is right and slower.

    It is like `model.to(...)`: call it before the model is used, not while runs are at work or others compute with it. CUDA
    graphs that somebody has captured read the memory where the weights were; those of `Graphs` are captured anew.

    Left alone are layers with a bias, weights that are quantised, sharded, offloaded, or computed by a parametrization, and
    groups of which a weight shares its memory with another tensor.

    Args:
        model: a transformers model in eval mode, on any devices.

    Raises:
        ValueError: it is no transformers model, or in training mode.
    """
    check_ready(model)
    joined = set[nn.Parameter]()
    for layers in _groups(model):
        for weights in _alike(cast(nn.Parameter, layer.weight) for layer in layers if _can_move(layer)):
            if (
                len(weights) > 1
                and joined.isdisjoint(weights)
                and together(weights) is None
                and all(map(_alone, weights))
            ):
                _lay_together(weights)
            joined.update(weights)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # where they were
    return model


def _groups(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """Linear layers that read the same tensor in a forward pass, in the order in which they are called."""
    read: dict[int, tuple[Any, list[nn.Linear]]] = {}  # by the id of a tensor, which is kept alive

    def note(layer: nn.Linear, inputs: tuple[Any, ...]) -> None:
        if len(inputs) == 1:
            layers = read.setdefault(id(inputs[0]), (inputs[0], []))[1]
            layers += [] if layer in layers else [layer]

    hooks = [part.register_forward_pre_hook(note) for part in model.modules() if isinstance(part, nn.Linear)]
    try:
        with torch.inference_mode():
            model(rows_of(model, 1, 2), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [layers for _, layers in read.values()]


def _can_move(layer: nn.Linear) -> bool:
    """Whether it is a plain layer whose product can be joined with others."""
    weight: Any = layer._parameters.get("weight")  # none if it is computed
    if type(weight) is not nn.Parameter or weight.is_meta or weight.is_inference():
        return False
    return layer.bias is None and weight.is_floating_point() and weight.is_contiguous()


def _alike(weights: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that can lie together, each once."""
    found: dict[Hashable, list[nn.Parameter]] = {}
    for weight in dict.fromkeys(weights):
        found.setdefault((weight.device, weight.dtype, weight.shape[1]), []).append(weight)
    return [*found.values()]


def _alone(weight: nn.Parameter) -> bool:
    """Whether all of its memory is its own, and nobody else's."""
    storage = weight.untyped_storage()
    return storage.nbytes() == weight.nbytes and torch._C._storage_Use_Count(storage._cdata) == _ALONE


def _lay_together(weights: Sequence[nn.Parameter]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        whole = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1])
        for weight, part in zip(weights, whole.split([*map(len, weights)]), strict=True):
            part.copy_(weight)
            # in a storage of its own, as whoever saves a model takes weights of one storage for one weight
            weight.data = torch.from_dlpack(part)
