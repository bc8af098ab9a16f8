"""Checkpoints of DFlash and DSpark, plain (z-lab, DeepSpec) and in the format of `speculators`, as parts of one network.

Ids of layers mean two things. Plain files count outputs of layers, so that id i is state i + 1 here, and the last is what
the LM head reads; `speculators` counts states as this library does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_int, as_ints
from specdec.drafters.shapes import (
    check_names,
    check_states,
    layer_config,
    leave_copies,
    own_embedding,
    own_head,
    target_ids,
)

# the method of an architecture, or of a speculators_model_type, and whether the root's slot drafts if no key says so
_METHODS = {
    "DFlashDraftModel": ("dflash", False),
    "Qwen3DFlashModel": ("dflash", True),
    "Qwen3DSparkModel": ("dspark", True),
    "dflash": ("dflash", False),
    "dspark": ("dspark", True),
}
_LEFT_OUT = ("t2d", "d2t", "verifier_lm_head.weight", "verifier_norm.weight")
_KINDS = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class BlockReading:
    """What files of block drafts differ in and their tensors do not tell.

    Args:
        from_anchor: whether each slot predicts the token after its own, so that the root's slot drafts too. If not, each
            fills in its own place, and a block drafts one token less.
        causal: of each layer, whether a slot sees only the slots before it. () for none.
        embedding_scale, logit_scale, logit_cap: factors of the embeddings and the logits, and the bound that `tanh` puts on
            the logits; None for no bound.
    """

    from_anchor: bool = False
    causal: Sequence[bool] = ()
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None


@dataclass(frozen=True, eq=False)
class BlockFile:
    """A checkpoint that fits a target.

    Args:
        arguments: what a `DFlashNet` is made of.
        tensors: of the network, by name.
        keys: `config.json`, with the keys of `dflash_config` among the others.
        vocab: size of the target's vocabulary.
        target_ids: [drafted] int64: the target's ids of the tokens that the network drafts; None for all of them.
    """

    arguments: dict[str, Any]
    tensors: dict[str, Tensor]
    keys: dict[str, Any]
    vocab: int
    target_ids: Tensor | None


def block_file(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    target: PreTrainedModel,
    method: str,
    states: Sequence[int] | None,
    sample_from_anchor: bool | None,
) -> BlockFile:
    """What a checkpoint says of a network. Raise ValueError if it is not one of this method for this target.

    Args:
        config, tensors: the `Checkpoint`; copies of the target's tensors are left out of it.
        target: the target.
        method: "dflash" or "dspark".
        states, sample_from_anchor: in place of what the file says; None for that.
    """
    keys = {**config, **(config.get("dflash_config") or {})}
    layers, text = config.get("transformer_layer_config") or config, target.config.get_text_config()
    from_anchor = _from_anchor(keys, tensors, method)
    check_names(tensors, "a block draft")
    states = _states(keys, text.num_hidden_layers) if states is None else as_ints("states", states)
    check_states(states, tensors, text)
    if (rows := len(tensors["fc.weight"])) != text.hidden_size:
        raise ValueError(
            f"fc.weight has {rows} rows, and the target's hidden size is {text.hidden_size}; use a draft made for this target."
        )
    ids = target_ids(tensors, text.vocab_size)
    leave_copies(tensors, target)
    own = own_embedding(tensors, text.hidden_size, text)
    made = layer_config(layers, tensors, text.hidden_size, text.vocab_size)
    arguments = {
        "config": made,
        "states": states,
        "state_size": text.hidden_size,
        "slots": as_int("block_size", keys.get("block_size"), 2),
        "mask_token": as_int("mask_token_id", keys.get("mask_token_id"), 0, (own or text.vocab_size) - 1),
        "vocab": own_head(tensors),
        "embedding": own,
        "reading": BlockReading(
            from_anchor if sample_from_anchor is None else sample_from_anchor,
            _causal(keys, layers, made.num_hidden_layers),
            *_scales(keys),
        ),
    }
    kept = {name: tensor for name, tensor in tensors.items() if name not in _LEFT_OUT}
    return BlockFile(arguments, kept, keys, text.vocab_size, ids)


def _from_anchor(keys: Mapping[str, Any], tensors: Mapping[str, Tensor], method: str) -> bool:
    """Whether the root's slot drafts. Raises ValueError if the file is of another method.

    DeepSpec's DFlash drafts are of DSpark's architecture, without its heads.
    """
    named = keys.get("speculators_model_type") or next(iter(keys.get("architectures") or []), None)
    found, from_anchor = _METHODS.get(str(named), (None, False))
    if found is None:
        raise ValueError(f"it is of architecture {named}; what can be read is {', '.join(_METHODS)}.")
    heads = any(name.startswith(("markov_head.", "confidence_head.")) for name in tensors)
    if found != method and (heads or found == "dflash"):
        other = {"dflash": "DFlashDrafter", "dspark": "DSparkDrafter"}[found]
        raise ValueError(f"it is a {found} checkpoint; read it with {other}.from_pretrained.")
    return bool(keys.get("sample_from_anchor", from_anchor))


def _states(keys: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    if (states := keys.get("aux_hidden_state_layer_ids")) is not None:
        return as_ints("aux_hidden_state_layer_ids", states)
    ids = as_ints("target_layer_ids", keys.get("target_layer_ids"), -1, cure="or pass states=...")
    return tuple(-1 if i + 1 == layers else i + 1 for i in ids)


def _causal(keys: Mapping[str, Any], layers: Mapping[str, Any], count: int) -> tuple[bool, ...]:
    """Which layers are causal: those with a window, unless a key says otherwise."""
    kinds, window = layers.get("layer_types") or ["full_attention"] * count, layers.get("sliding_window")
    sliding = [kind == "sliding_attention" for kind in kinds]
    if len(kinds) != count or not {*kinds} <= {*_KINDS} or (any(sliding) and not window):
        raise ValueError(
            f"layer_types={kinds}, sliding_window={window}: must be one of {_KINDS} for each of {count} layers."
        )
    every, causal = keys.get("is_causal"), keys.get("causal", not keys.get("sliding_window_non_causal", False))
    return tuple(slides and bool(causal) if every is None else bool(every) for slides in sliding)


def _scales(keys: Mapping[str, Any]) -> tuple[float, float, float | None]:
    scales = (float(keys.get(name, 1.0)) for name in ("input_embedding_scale", "output_multiplier"))
    return (*scales, keys.get("final_logit_softcapping") or None)  # type: ignore[return-value]
