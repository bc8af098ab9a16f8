"""Files of EAGLE-3 drafts in all their layouts, as arguments and tensors of one network.

Tools name the layers whose states a draft reads in four ways. Here i is the residual stream before layer i, as in
`Drafter.states`, so that a file's numbers are read by the key that they stand under:

| key | i in the file |
|---|---|
| `eagle_aux_hidden_state_layer_ids`, `aux_hidden_state_layer_ids` (vLLM, speculators) | before layer i |
| the same under `eagle_config` (SGLang, Model-Optimizer, TensorRT-LLM), `target_layer_ids` (DeepSpec) | after layer i: i + 1 |
| none of these | before layers 2, n // 2 and n - 3 of n |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_ints, check_kind
from specdec.drafters.checkpoints import naming, read_checkpoint
from specdec.drafters.shapes import (
    check_names,
    check_states,
    count,
    layer_config,
    leave_copies,
    own_embedding,
    own_head,
    target_ids,
)

IDS = "eagle_aux_hidden_state_layer_ids"
_BEFORE, _AFTER = (IDS, "aux_hidden_state_layer_ids"), "target_layer_ids"
_UNUSED = ("t2d", "d2t")  # told by `target_ids`


@dataclass(frozen=True)
class Eagle3Reading:
    """What files of EAGLE-3 drafts differ in and their tensors do not tell.

    Args:
        norm_before_residual: whether the first layer adds to the normed feature.
        norm_output: whether the normed output is the next feature (EAGLE-3.1).
    """

    norm_before_residual: bool = False
    norm_output: bool = False


class Eagle3File(NamedTuple):
    """What a file says of a network: its arguments, how it is read, its tokens, and its tensors by the network's names."""

    arguments: dict[str, Any]
    reading: Eagle3Reading
    target_ids: Tensor | None
    tensors: dict[str, Tensor]


def read_eagle3(source: str | Path, target: PreTrainedModel, states: Sequence[int] | None) -> Eagle3File:
    """Read a checkpoint; `states` are read in place of those that it names. Raise ValueError if it is not for this target."""
    check_kind("target", target, PreTrainedModel, "pass the model that it drafts for")
    keys, found = read_checkpoint(source)
    with naming(source):
        return _read(keys, found, target, states)


def default_states(layers: int) -> tuple[int, ...]:
    """The states that a draft reads of a target with so many layers if its file names none."""
    return 2, layers // 2, layers - 3


def _read(
    keys: Mapping[str, Any], found: dict[str, Tensor], target: PreTrainedModel, states: Sequence[int] | None
) -> Eagle3File:
    tensors = {name.replace("midlayer.", "layers.0.", 1): tensor for name, tensor in found.items()}
    _check_draft(keys, tensors)
    goal = target.config.get_text_config()
    hidden, vocab = tensors["fc.weight"].shape[0], goal.vocab_size
    ids = target_ids(tensors, vocab)
    leave_copies(tensors, target)
    config = layer_config(keys.get("transformer_layer_config", keys), tensors, hidden, vocab)
    config.max_position_embeddings = max(config.max_position_embeddings, getattr(goal, "max_position_embeddings", 0))
    taken = _states(keys, goal.num_hidden_layers) if states is None else as_ints("states", states, -1)
    check_states(taken, tensors, goal)
    arguments = {
        "config": config,
        "states": taken,
        "state_size": goal.hidden_size,
        "vocab": own_head(tensors),
        "embedding": own_embedding(tensors, hidden, goal),
        "head_norms": "layers.0.self_attn.q_norm.weight" in tensors,
        "norms": _norms(keys, tensors),
    }
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _UNUSED}
    return Eagle3File(arguments, _reading(keys), ids, tensors)


def _check_draft(keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless this is an EAGLE-3 draft, of layers that the network has."""
    kind = keys.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise ValueError(f"speculators_model_type is {kind!r}; read it with the drafter of that kind.")
    block = [name for name in keys.get("architectures") or () if "DSpark" in name or "DFlash" in name]
    if block:
        name = "DSparkDrafter" if "DSpark" in block[0] else "DFlashDrafter"
        raise ValueError(f"it is of architecture {block[0]}; use {name}.from_pretrained.")
    family = keys.get("transformer_layer_config", keys).get("model_type", "llama")
    if "gemma" in family:  # norms by 1 + weight, embeddings times a scale
        raise ValueError(f"model_type is {family!r}; drafts with layers of Llama or Qwen3 are read, and no others.")
    check_names(tensors, "an EAGLE-3 draft")
    if tensors["layers.0.self_attn.q_proj.weight"].shape[1] == tensors["fc.weight"].shape[0]:
        raise ValueError(
            "its first layer reads no token: it is of EAGLE-1 or EAGLE-2; use EagleDrafter.from_pretrained."
        )


def _states(keys: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    for key in _BEFORE:
        if keys.get(key):
            return tuple(keys[key])
    after = (keys.get("eagle_config") or {}).get(IDS) or keys.get(_AFTER)
    return tuple(i + (i >= 0) for i in after) if after else default_states(layers)  # -1: what the LM head reads


def _norms(keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    if keys.get("fc_norm") or count(tensors, "fc_norm."):
        return "fc_norm"
    return "input_norm" if keys.get("norm_before_fc") or "input_norm.weight" in tensors else ""


def _reading(keys: Mapping[str, Any]) -> Eagle3Reading:
    """Where a file does not say it, engines take speculators' to add to the normed feature, and others not to."""
    residual = keys.get("norm_before_residual")
    by_format = "transformer_layer_config" in keys
    return Eagle3Reading(by_format if residual is None else bool(residual), bool(keys.get("norm_output")))
