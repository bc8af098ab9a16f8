"""Which models can be targets: found out by running them once, not by a list of names.

A model is supported when its attention goes through transformers' attention interface, its cache is made of plain
key-value layers, and a small tree scored in one forward pass gives the logits of the paths scored one by one.
"""

from __future__ import annotations

import warnings
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.attention import NAME, Patch, View, counting_calls
from specdec.cache import RecordingCache, Slab
from specdec.tree import Topology, TreeSpec

Layout = list[tuple[Slab, Slab] | None]

# Largest difference between a tree and its paths, as a fraction of the largest logit. Rounding stays orders of
# magnitude below (measured: 1e-6 in float32); a wrong mask or position changes logits by a tenth or more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.15

_OUTSIDE_INTERFACE = "its attention does not go through transformers' attention interface"
_SLOT_BIAS = "its position bias follows the slot in the cache, not the position in the text"
_RECURRENT = "its recurrent state cannot be rolled back after a rejection"
_REFUSED = {
    **dict.fromkeys(["bloom", "mpt"], _SLOT_BIAS),
    **dict.fromkeys(["falcon", "gptj", "gpt_neo"], _OUTSIDE_INTERFACE),
    **dict.fromkeys(
        ["qwen3_next", "qwen3_5", "lfm2", "mamba", "mamba2", "jamba", "bamba", "falcon_h1", "minimax"], _RECURRENT
    ),
}
_PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}

_layouts: WeakKeyDictionary[PreTrainedModel, tuple[tuple, Layout]] = WeakKeyDictionary()


class UnsupportedModel(ValueError):
    """The model cannot score trees; the message says why."""

    def __init__(self, model: PreTrainedModel, reason: str):
        cure = "Supported are decoder-only models with plain attention, such as Llama, Qwen, Gemma, Mistral or GPT-2."
        super().__init__(f"{type(model).__name__} cannot be decoded speculatively: {reason}. {cure}")


def layout_of(model: PreTrainedModel) -> Layout:
    """The shapes of the model's key-value layers, in order; raises UnsupportedModel. Probed once per model."""
    weight = embedding(model)
    kind = weight.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None  # the cache takes its dtype
    signature = (weight.dtype, weight.device, weight.shape, autocast)
    known = _layouts.get(model)
    if known is None or known[0] != signature:
        known = _layouts[model] = (signature, _probe(model))
    return known[1]


def _probe(model: PreTrainedModel) -> Layout:
    kind = model.config.get_text_config().model_type
    if kind in _REFUSED:
        raise UnsupportedModel(model, _REFUSED[kind])
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(model, "it is an encoder-decoder model")
    if not model._can_set_attn_implementation():
        raise UnsupportedModel(model, _OUTSIDE_INTERFACE)
    layers = DynamicCache(config=model.config).layers
    odd = sorted({type(layer).__name__ for layer in layers} - _PLAIN_LAYERS)
    if odd or model._is_stateful:
        raise UnsupportedModel(model, f"{_RECURRENT} (cache layers: {', '.join(odd) or 'stateful'})")
    with torch.inference_mode():
        logits, layout = _score_probe_tree(model, len(layers))
        _compare_with_own_attention(model, logits)
    return layout


_PROBE = (1, 2, 3)  # a root and its two children; every vocabulary has these ids


def _score_probe_tree(model: PreTrainedModel, layers: int) -> tuple[Tensor, Layout]:
    device = embedding(model).device
    topology = Topology(torch.tensor([[-1, 0, 0]], device=device), depth=1, width=2)
    view = View(torch.zeros(1, dtype=torch.int64, device=device), topology, count=3, slots=3)
    cache = RecordingCache(layers, view)
    with Patch(model), counting_calls() as calls:
        logits = model(
            input_ids=_tokens(model, *_PROBE),
            position_ids=view.positions,
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
    if not calls:
        raise UnsupportedModel(model, f"{_OUTSIDE_INTERFACE} ({NAME} was never called)")
    layout: Layout = [(r.slabs[0], r.slabs[1]) if r.is_initialized else None for r in cache.records]
    if not any(layout):
        raise UnsupportedModel(model, "it does not write its keys and values to the cache it is given")
    return logits, layout


def _compare_with_own_attention(model: PreTrainedModel, logits: Tensor) -> None:
    """With the paths as the model has them by the attention that it is set to, or else by the one that defines it."""
    try:
        _compare_with_paths(model, logits)
    except UnsupportedModel:
        own = model.config._attn_implementation
        with Patch(
            model, "eager"
        ):  # what comes with every class; faster ones may leave out what they are told, a softcap say
            _compare_with_paths(model, logits)
        warnings.warn(
            f"{type(model).__name__}: its {own!r} attention leaves out a part of what its own 'eager' attention does, so "
            "model.generate gives another text than specdec, which computes all of it; "
            "model.set_attn_implementation('eager') gives both the same.",
            stacklevel=2,
        )


def _compare_with_paths(model: PreTrainedModel, logits: Tensor) -> None:
    root, *children = _PROBE
    for node, child in enumerate(children, start=1):
        alone = model(input_ids=_tokens(model, root, child), use_cache=False).logits[0, -1]
        difference = float((logits[node] - alone).abs().max() / alone.abs().max())
        quantised = getattr(model, "is_quantized", False)
        limit = _LOW_PRECISION_TOLERANCE if quantised else _TOLERANCE.get(alone.dtype, _LOW_PRECISION_TOLERANCE)
        if not difference <= limit and bool(alone.isfinite().all()):
            reason = f"a tree in one forward pass differs from its paths by {difference:.1e} of the largest logit"
            raise UnsupportedModel(model, f"{reason} (limit {limit:.0e})")


def context_length_of(model: PreTrainedModel) -> int | None:
    """Longest text, in tokens, whose logits do not depend on how it was cut into forward passes; None if unbounded."""
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for law in [rope, *(law for law in rope.values() if isinstance(law, dict))]:
        if law.get("rope_type") == "longrope":  # a longer text rotates every key anew, those in the cache included
            limits.append(law["original_max_position_embeddings"])
    if getattr(
        config, "attn_temperature_tuning", False
    ):  # Llama 4: a scale that steps up with the slot, not the position
        limits.append(config.floor_scale - 1)
    return min((limit for limit in limits if limit is not None), default=None)


def check_clock(spec: TreeSpec, model: PreTrainedModel | None) -> None:
    """Raise ValueError where every process of a model that is cut over several would draft by its own clock."""
    processes = getattr(model, "tp_size", None) or 1
    if spec.by_clock and processes > 1:
        raise ValueError(
            f"Trees are chosen by measured times, and {processes} processes that share this model would wait for each other "
            "with different ones; give the same times to all of them, Adaptive(costs=...)."
        )


def _tokens(model: PreTrainedModel, *ids: int) -> Tensor:
    weight = embedding(model)
    return torch.tensor([ids], device=weight.device) % weight.shape[0]


def embedding(model: PreTrainedModel) -> Tensor:
    """[vocab, hidden]: the input embedding; token ids go to its device."""
    return cast(Tensor, model.get_input_embeddings().weight)
