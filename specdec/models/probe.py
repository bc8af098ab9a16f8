"""Which models can be targets: they are run once, and no list of names is needed.

A model is supported when its attention goes through transformers' attention interface, its cache is made of plain
key-value layers and of recurrent ones, and a small tree scored in one forward pass gives the logits of the paths scored one
by one. With recurrent layers, more is checked: see `specdec.models.recurrent_probe`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from specdec.models.attention import NAME, View, attend, mask
from specdec.models.fingerprint import fingerprint
from specdec.models.layer_shapes import LayerShape
from specdec.models.path_probe import PROBE, apart_by, compare_with_own_attention, inputs_for
from specdec.models.prepared_inputs import full_name, takes
from specdec.models.ready import UnsupportedModel, autocast_dtype, device_of, embedding, rows_of
from specdec.models.recording import RecordingCache
from specdec.models.recurrent_probe import checks, over_cache
from specdec.models.routing import Route
from specdec.models.served_functions import one_pass, serve
from specdec.models.stored_layers import unrounded
from specdec.tree import Topology

Layout = list[LayerShape]

_OUTSIDE_INTERFACE = "its attention does not go through transformers' attention interface"
_SLOT_BIAS = "its position bias follows the slot in the cache, not the position in the text"
_REFUSED = {
    **dict.fromkeys(["bloom", "mpt"], _SLOT_BIAS),
    **dict.fromkeys(["falcon", "gptj", "gpt_neo"], _OUTSIDE_INTERFACE),
}
_STATE_ELSEWHERE = "its recurrent state is not in layers of the cache that it is given"
_PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


@dataclass
class _Probed:
    """What was found out about one model. One thread probes it, and others wait."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    signature: tuple[Any, ...] = ()  # the state of the model when it was probed
    layout: Layout = field(default_factory=list)


_probed: WeakKeyDictionary[PreTrainedModel, _Probed] = WeakKeyDictionary()


class _Calls(threading.local):
    """The calls of tree attention in the probe that a thread is in."""

    def __init__(self) -> None:
        self.names: list[str] = []  # of the calling modules: torch.compile would lose a count


_calls = _Calls()


def _counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    _calls.names.append(type(module).__name__)
    return attend(module, *args, **kwargs)


_COUNTED = f"{NAME}_counted"
AttentionInterface.register(_COUNTED, _counted)
AttentionMaskInterface.register(_COUNTED, mask)


def layout_of(model: PreTrainedModel) -> Layout:
    """The shapes of the model's key-value layers, in order; raises UnsupportedModel. A model is probed once per state."""
    known = _probed.setdefault(model, _Probed())
    with known.lock:
        signature = (autocast_dtype(device_of(model)), fingerprint(model, numbers=False))
        if known.signature != signature:
            known.layout, known.signature = _probe(model), signature
        return known.layout


def _probe(model: PreTrainedModel) -> Layout:
    kind = model.config.get_text_config().model_type
    if kind in _REFUSED:
        raise UnsupportedModel(model, _REFUSED[kind])
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(model, "it is an encoder-decoder model")
    if not model.can_generate():
        raise UnsupportedModel(model, "it has no LM head", "Load it as one that has: AutoModelForCausalLM.")
    layers = DynamicCache(config=model.config).layers
    recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    if model._is_stateful and not recurrent:
        raise UnsupportedModel(model, _STATE_ELSEWHERE)
    attends = any(isinstance(layer, CacheLayerMixin) for layer in layers)
    if attends and not takes(model, "position_ids"):
        raise UnsupportedModel(
            model, "its forward pass takes no position_ids, and nodes of a tree side by side need them"
        )
    updates: Any = model._update_model_kwargs_for_generation
    if not full_name(updates).startswith("transformers."):
        reason = f"{full_name(updates)} may change what later steps compute, and is not asked here"
        raise UnsupportedModel(model, reason, "Call model.generate without specdec.")
    if attends and not model._can_set_attn_implementation():
        raise UnsupportedModel(model, _OUTSIDE_INTERFACE)
    odd = {type(layer).__name__ for layer in layers if not isinstance(layer, LinearAttentionCacheLayerMixin)}
    if odd := sorted(odd - _PLAIN_LAYERS):
        raise UnsupportedModel(
            model, f"its cache holds more than plain keys and values (cache layers: {', '.join(odd)})"
        )
    try:
        with torch.inference_mode(), unrounded():  # rounding of activations differs by more than a tree may
            if recurrent:
                return _probe_recurrent(model)
            logits, layout = score_probe_tree(model)
            compare_with_own_attention(model, logits)
    except RuntimeError as error:
        if "inference tensor" not in str(error).lower():
            raise
        cure = "Load it without its quantisation, and store its weights with specdec.store_weights on a CPU."
        raise UnsupportedModel(model, f"it does not run in torch.inference_mode ({error})", cure) from error
    return layout


def _probe_recurrent(model: PreTrainedModel) -> Layout:
    for first in (True, False):
        inputs_for(model, rows_of(model, *PROBE), first)
    # Some models give float32 logits in any dtype, and transformers' recurrences compute in float32 in wider ones.
    dtypes = autocast_dtype(device_of(model)), embedding(model).dtype, torch.float32
    inside = min((dtype for dtype in dtypes if dtype), key=lambda dtype: dtype.itemsize)
    try:
        layout = score_probe_tree(model)[1]
        for what, found, alone in checks(model, layout, partial(rows_of, model, least=2)):
            if apart := apart_by(model, found, alone, inside):
                raise UnsupportedModel(
                    model, f"{what} differs by {apart}, from what its own cache gives token by token"
                )
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever its own code raises
        summary = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        raise UnsupportedModel(model, f"a forward pass over our cache fails with {summary}") from error
    return layout


def score_probe_tree(model: PreTrainedModel) -> tuple[Tensor, Layout]:
    """Score a small tree in one pass: logits [row, node, vocab], and what the layers keep."""
    tokens = rows_of(model, *PROBE)
    batch, device = len(tokens), tokens.device
    topology = Topology(torch.tensor([[-1, 0, 0]] * batch, device=device), depth=1, width=2)
    view = View(torch.zeros(batch, dtype=torch.int64, device=device), topology, count=3, slots=3)
    kinds = DynamicCache(config=model.config).layers
    cache = RecordingCache(kinds, view)
    serve(model)
    _calls.names.clear()
    with Route(model, _COUNTED), one_pass():
        logits = over_cache(model, cache, tokens, view.positions)
    layout = cache.shapes
    attends = any(isinstance(kind, CacheLayerMixin) for kind in kinds)
    if attends and not _calls.names:
        raise UnsupportedModel(model, f"{_OUTSIDE_INTERFACE} ({NAME} was never called)")
    if attends and not any(shape.slabs for shape in layout):
        raise UnsupportedModel(model, "it does not write its keys and values to the cache it is given")
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "given", False) and layout[index].recurrent is None:
            raise UnsupportedModel(model, f"layer {index} keeps a state that is computed by no function known here")
    return logits, layout


def run_alone(model: PreTrainedModel) -> None:
    """Run the model over a token, with no cache."""
    with torch.inference_mode():
        model(input_ids=rows_of(model, PROBE[0]), use_cache=False)
