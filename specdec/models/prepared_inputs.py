"""The inputs that `model.generate` makes of a text, by the model's own `prepare_inputs_for_generation`.

Most models take the tokens alone, and that is all we give them. Others put something before the tokens or in their place, as
PEFT does for soft prompts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin


def takes(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's forward pass has an argument of this name, or `**kwargs`."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(each.kind == each.VAR_KEYWORD for each in parameters.values())


def prepared_inputs(model: PreTrainedModel, tokens: Tensor, first: bool) -> dict[str, Any]:
    """Inputs of a pass over whole texts, tokens [batch, length] int64, without a cache: a run's `first` pass or a later."""
    options: dict[str, Any] = {}
    if takes(model, "attention_mask"):
        options["attention_mask"] = torch.ones_like(tokens)
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    prepare: Any = model.prepare_inputs_for_generation
    return prepare(tokens, use_cache=False, is_first_iteration=first, **options)


def holds_text(cache: Cache) -> bool:
    """Whether a cache of transformers holds the beginning of a text."""
    attending = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    states = [flag for layer in cache.layers for flag in getattr(layer, "has_previous_state", {}).values()]
    return any(layer.get_seq_length() for layer in attending) or any(states)


def preparer_name(model: PreTrainedModel) -> str:
    """The qualified name of the model's `prepare_inputs_for_generation`, for messages."""
    return full_name(model.prepare_inputs_for_generation)


def full_name(function: Any) -> str:
    """A function's name with its module, which begins with "transformers." for functions of transformers."""
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"


def difference_from_text(inputs: dict[str, Any], tokens: Tensor) -> str | None:
    """How inputs differ from those of the text alone, tokens [batch, length] int64; None if they do not."""
    ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if inputs.get("inputs_embeds") is not None:
        return "embeddings in place of tokens"
    if ids is None or ids.shape != tokens.shape or not torch.equal(ids.to(tokens), tokens):
        return "other tokens than those of the text"
    if any(isinstance(value, Cache) and holds_text(value) for value in inputs.values()):
        return "keys and values to go before the text"
    if isinstance(mask, Tensor) and mask.dim() == 2 and (mask.shape != tokens.shape or not mask.all()):
        return "a mask that is not of the text alone"
    counted = torch.arange(tokens.shape[1], device=tokens.device)
    if positions is not None and not (
        positions.shape[-1:] == counted.shape and bool((positions.to(counted) == counted).all())
    ):
        return "positions that do not count from 0"
    return None
