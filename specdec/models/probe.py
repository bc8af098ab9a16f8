"""Which models can be targets: they are run once, and no list of names is needed.

A model is supported when its attention goes through transformers' attention interface, its cache is made of plain
key-value layers and of recurrent ones, and a small tree scored in one forward pass gives the logits of the paths scored one
by one. With recurrent layers, more is checked: see `specdec.models.recurrent_probe`.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from specdec.checks import wrong_kind
from specdec.models.attention import NAME, View, attend, mask
from specdec.models.cache import cache_argument
from specdec.models.fingerprint import fingerprint
from specdec.models.layer_shapes import LayerShape
from specdec.models.prepared_inputs import difference_from_text, full_name, prepared_inputs, preparer_name, takes
from specdec.models.recording import RecordingCache
from specdec.models.recurrent_probe import checks, over_cache
from specdec.models.routing import Route
from specdec.models.served_functions import one_pass, serve
from specdec.models.stored_layers import is_stored, weight_like
from specdec.tree import Topology

Layout = list[LayerShape]

# Largest difference between a tree and its paths, as a fraction of the largest logit. Rounding stays orders of
# magnitude below (measured: 1e-6 in float32); a wrong mask or position changes logits by a tenth or more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.15

_PROBE = (1, 2, 3)  # a root and its two children; every vocabulary has these ids

_OUTSIDE_INTERFACE = "its attention does not go through transformers' attention interface"
_SLOT_BIAS = "its position bias follows the slot in the cache, not the position in the text"
_REFUSED = {
    **dict.fromkeys(["bloom", "mpt"], _SLOT_BIAS),
    **dict.fromkeys(["falcon", "gptj", "gpt_neo"], _OUTSIDE_INTERFACE),
}
_STATE_ELSEWHERE = "its recurrent state is not in layers of the cache that it is given"
_PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}

_SUPPORTED = (
    "Supported are decoder-only models with plain attention, such as Llama, Qwen, Gemma, Mistral or GPT-2, or with recurrent "
    "states in transformers' cache, such as Qwen3.5, Mamba, Nemotron-H or LFM2."
)
_TOKENS_ALONE = (
    "Only the tokens of a text are read here: train what goes beside them into the weights (LoRA does), give it as tokens of "
    "the prompt, or call model.generate without specdec."
)


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


class UnsupportedModel(ValueError):
    """The model cannot score trees; the message says why."""

    def __init__(self, model: PreTrainedModel, reason: str, cure: str = _SUPPORTED):
        super().__init__(f"{type(model).__name__} cannot be decoded speculatively: {reason}. {cure}")


def check_ready(model: PreTrainedModel) -> None:
    """Raise ValueError if this is no transformers model, or one that is not ready. It is cheap: called before every run."""
    if not isinstance(model, PreTrainedModel):
        raise wrong_kind("model", model, cure_for(model))
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode (dropout is on); call model.eval() first.")
    if any(_given_by_hooks(model).get("alora_offsets") or ()):
        raise UnsupportedModel(
            model,
            "its activated LoRA counts the tokens it adapts from the end of a forward pass, and passes end elsewhere here",
            "Call model.generate without specdec, or train the adapter as a plain LoRA.",
        )


def cure_for(wrapper: object) -> str:
    """What to pass in place of an object that is no transformers model, but may hold one."""
    named = wrapper.named_modules() if isinstance(wrapper, torch.nn.Module) else ()
    inner = next((name for name, part in named if isinstance(part, PreTrainedModel)), None)
    if inner is None:
        return "pass a transformers model, as from AutoModelForCausalLM.from_pretrained(name)"
    return f"pass the model in it, .{inner} (without what the wrapper does by itself, such as PEFT's soft prompts)"


def check_text(model: PreTrainedModel, text: list[int]) -> None:
    """Raise UnsupportedModel if `model.generate` would hand other things to the model than the tokens of this text."""
    _inputs_for(model, torch.tensor([text], device=device_of(model)), first=True)


def _inputs_for(model: PreTrainedModel, tokens: Tensor, first: bool) -> dict[str, Any]:
    inputs = prepared_inputs(model, tokens, first)
    if difference := difference_from_text(inputs, tokens):
        raise UnsupportedModel(model, f"{preparer_name(model)} hands over {difference}", _TOKENS_ALONE)
    return inputs


def layout_of(model: PreTrainedModel) -> Layout:
    """The shapes of the model's key-value layers, in order; raises UnsupportedModel. A model is probed once per state."""
    known = _probed.setdefault(model, _Probed())
    with known.lock:
        signature = (autocast_dtype(device_of(model)), fingerprint(model, numbers=False))
        if known.signature != signature:
            known.layout, known.signature = _probe(model), signature
        return known.layout


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that torch.autocast computes in now, and so that of keys and values; None outside of autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _given_by_hooks(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that the caller's hooks pass to layers, one per row: PEFT's `adapter_names` and `alora_offsets`."""
    hooks = (hook for module in model.modules() for hook in list(module._forward_pre_hooks.values()))
    return {name: value for hook in hooks if isinstance(hook, partial) for name, value in hook.keywords.items()}


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
        with torch.inference_mode():
            if recurrent:
                return _probe_recurrent(model)
            logits, layout = score_probe_tree(model)
            _compare_with_own_attention(model, logits)
    except RuntimeError as error:
        if "inference tensor" not in str(error).lower():
            raise
        cure = "Load it without its quantisation, and store its weights with specdec.store_weights on a CPU."
        raise UnsupportedModel(model, f"it does not run in torch.inference_mode ({error})", cure) from error
    return layout


def _probe_recurrent(model: PreTrainedModel) -> Layout:
    for first in (True, False):
        _inputs_for(model, _rows(model, *_PROBE), first)
    # Some models give float32 logits in any dtype, and transformers' recurrences compute in float32 in wider ones.
    dtypes = autocast_dtype(device_of(model)), embedding(model).dtype, torch.float32
    inside = min((dtype for dtype in dtypes if dtype), key=lambda dtype: dtype.itemsize)
    try:
        layout = score_probe_tree(model)[1]
        for what, found, alone in checks(model, layout, partial(_rows, model, least=2)):
            if apart := _apart(model, found, alone, inside):
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
    tokens = _rows(model, *_PROBE)
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
        model(input_ids=_rows(model, _PROBE[0]), use_cache=False)


def _compare_with_own_attention(model: PreTrainedModel, logits: Tensor) -> None:
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
    root, *children = _PROBE
    for node, (child, first) in enumerate(zip(children, (True, False), strict=True), start=1):
        path = _rows(model, root, child)
        inputs = _inputs_for(model, path, first)
        if apart := _apart(model, logits[:, node], model(**inputs).logits[:, -1]):
            alone = model(input_ids=path, use_cache=False).logits[:, -1]
            if not _apart(model, logits[:, node], alone):
                raise UnsupportedModel(model, *_beside(model, inputs))
            raise UnsupportedModel(model, _why_apart(model, path, alone, apart))
    if apart := _apart(model, logits[:, node], _over_cache(model, path, inputs)):
        raise UnsupportedModel(
            model,
            f"a token that is scored alone, after others in a cache, differs by {apart}, from the same token scored with them",
            "What it computes, in a hook say, must not depend on where a forward pass begins: passes begin elsewhere here.",
        )


def _over_cache(model: PreTrainedModel, path: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[row, vocab]: logits after the last token of a path [row, length] int64, read alone after the others in a cache."""
    cache = {cache_argument(model): DynamicCache(config=model.config), "use_cache": True}
    model(**{**_inputs_for(model, path[:, :-1], first=True), **cache})
    last = {name: inputs[name][..., -1:] for name in ("input_ids", "position_ids") if inputs.get(name) is not None}
    return model(**{**inputs, **last, **cache}).logits[:, -1]


def _apart(model: PreTrainedModel, found: Tensor, alone: Tensor, inside: torch.dtype | None = None) -> str | None:
    """How far the tree's logits are from its path's, both [row, vocab]; None if near enough.

    Args:
        inside: a dtype that the model computes some of it in.
    """
    dtype = alone.dtype if inside is None or alone.dtype.itemsize < inside.itemsize else inside
    difference = float((found - alone).abs().max() / alone.abs().max())
    quantised = getattr(model, "is_quantized", False) or is_stored(model)
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


def _rows(model: PreTrainedModel, *ids: int, least: int = 1) -> Tensor:
    """[row, length] int64: the same text in as many rows as the caller's hooks expect."""
    rows = len(_given_by_hooks(model).get("adapter_names") or [0] * least)
    return torch.tensor([ids] * rows, device=device_of(model)) % embedding(model).shape[0]


def embedding(model: PreTrainedModel) -> Tensor:
    """[vocab, hidden]: the input embedding, or a tensor like it that holds no numbers.

    It is on the meta device while accelerate keeps it elsewhere.
    """
    weight = weight_like(model.get_input_embeddings())
    if weight is None:
        raise UnsupportedModel(model, "it does not read one token at a time through one embedding")
    return cast(Tensor, weight)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    weight = embedding(model)
    if not weight.is_meta:
        return weight.device
    with torch.inference_mode():  # an offloaded weight: run the layer to see where it goes
        device = model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.int64)).device
    if device.type == "meta":
        raise UnsupportedModel(model, "its weights are on the meta device", "Load them: from_pretrained(...).")
    return device
