"""Whether nodes of a tree get the logits that a model gives the paths to them, with the inputs of `model.generate`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.models.cache import cache_argument
from specdec.models.prepared_inputs import difference_from_text, prepared_inputs, preparer_name
from specdec.models.ready import UnsupportedModel, autocast_dtype, device_of, rows_of
from specdec.models.routing import Route

# Largest difference between a tree and its paths, as a fraction of the largest logit. Rounding stays orders of
# magnitude below (measured: 1e-6 in float32); a wrong mask or position changes logits by a tenth or more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.15

PROBE = (1, 2, 3)  # a root and its two children; every vocabulary has these ids

_TOKENS_ALONE = (
    "Only the tokens of a text are read here: train what goes beside them into the weights (LoRA does), give it as tokens of "
    "the prompt, or call model.generate without specdec."
)


def check_text(model: PreTrainedModel, text: list[int]) -> None:
    """Raise UnsupportedModel if `model.generate` would hand other things to the model than the tokens of this text."""
    inputs_for(model, torch.tensor([text], device=device_of(model)), first=True)


def inputs_for(model: PreTrainedModel, tokens: Tensor, first: bool) -> dict[str, Any]:
    inputs = prepared_inputs(model, tokens, first)
    if difference := difference_from_text(inputs, tokens):
        raise UnsupportedModel(model, f"{preparer_name(model)} hands over {difference}", _TOKENS_ALONE)
    return inputs


def compare_with_own_attention(model: PreTrainedModel, logits: Tensor) -> None:
    """Compare the tree's logits with those of its paths, under the attention that the model is set to, else under eager."""
    try:
        _compare_with_paths(model, logits)
    except UnsupportedModel:
        own = model.config._attn_implementation
        with Route(model, "eager"):  # faster implementations may leave something out, such as a softcap
            _compare_with_paths(model, logits)
        warnings.warn(
            f"{type(model).__name__}: its {own!r} attention leaves out a part of what its own 'eager' attention does, so "
            "model.generate gives another text than specdec, which computes all of it; "
            "model.set_attn_implementation('eager') gives both the same.",
            stacklevel=2,
        )


def _compare_with_paths(model: PreTrainedModel, logits: Tensor) -> None:
    """Compare with the paths' logits under the inputs of `model.generate`, in a first pass and in a later one."""
    root, *children = PROBE
    for node, (child, first) in enumerate(zip(children, (True, False), strict=True), start=1):
        path = rows_of(model, root, child)
        inputs = inputs_for(model, path, first)
        if apart := apart_by(model, logits[:, node], model(**inputs).logits[:, -1]):
            alone = model(input_ids=path, use_cache=False).logits[:, -1]
            if not apart_by(model, logits[:, node], alone):
                raise UnsupportedModel(model, *_beside(model, inputs))
            raise UnsupportedModel(model, _why_apart(model, path, alone, apart))
    if apart := apart_by(model, logits[:, node], _over_cache(model, path, inputs)):
        raise UnsupportedModel(
            model,
            f"a token that is scored alone, after others in a cache, differs by {apart}, from the same token scored with them",
            "What it computes, in a hook say, must not depend on where a forward pass begins: passes begin elsewhere here.",
        )


def _over_cache(model: PreTrainedModel, path: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[row, vocab]: logits after the last token of a path [row, length] int64, read alone after the others in a cache."""
    cache = {cache_argument(model): DynamicCache(config=model.config), "use_cache": True}
    model(**{**inputs_for(model, path[:, :-1], first=True), **cache})
    last = {name: inputs[name][..., -1:] for name in ("input_ids", "position_ids") if inputs.get(name) is not None}
    return model(**{**inputs, **last, **cache}).logits[:, -1]


def apart_by(model: PreTrainedModel, found: Tensor, alone: Tensor, inside: torch.dtype | None = None) -> str | None:
    """How far the tree's logits are from its path's, both [row, vocab]; None if near enough.

    Args:
        inside: a dtype that the model computes some of it in.
    """
    dtypes = inside, autocast_dtype(device_of(model)), alone.dtype  # stored layers give float32 under autocast
    dtype = min((dtype for dtype in dtypes if dtype), key=lambda dtype: dtype.itemsize)
    difference = float((found - alone).abs().max() / alone.abs().max())
    quantised = getattr(model, "is_quantized", False)
    limit = _LOW_PRECISION_TOLERANCE if quantised else _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE)
    near = difference <= limit or not bool(alone.isfinite().all())
    return None if near else f"{difference:.1e} of the largest logit, of which rounding is at most {limit:.0e}"


def _why_apart(model: PreTrainedModel, path: Tensor, alone: Tensor, apart: str) -> str:
    later = torch.arange(path.shape[1], device=path.device).expand_as(path) * 2
    if torch.equal(model(input_ids=path, position_ids=later, use_cache=False).logits[:, -1], alone):
        return "it numbers tokens by their place in the cache, whatever position_ids say"
    return f"a tree in one forward pass differs from its paths by {apart}"


def _beside(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[str, str]:
    """Why these inputs give other logits than the tokens alone, and the cure."""
    text = ("input_ids", "attention_mask", "position_ids", "use_cache")
    names = ", ".join(name for name, value in inputs.items() if value is not None and name not in text)
    if names:
        return f"{preparer_name(model)} hands over {names} beside the tokens", _TOKENS_ALONE
    return (
        "a text with its attention_mask and position_ids, as model.generate gives them, has other logits than its tokens "
        "alone: it reads a mask of ones as something else, or computes the same text in two ways, as with quantisation that "
        "is decided in each pass",
        "Load it without such quantisation, or have its forward pass take a mask of ones for none.",
    )
