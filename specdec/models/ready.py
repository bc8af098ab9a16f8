"""What is asked of a model before anything is run in it: whether it is one, whether it is ready, and where its tokens go."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import wrong_kind

_SUPPORTED = (
    "Supported are decoder-only models with plain attention, such as Llama, Qwen, Gemma, Mistral or GPT-2, or with recurrent "
    "states in transformers' cache, such as Qwen3.5, Mamba, Nemotron-H or LFM2."
)


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
    if any(given_by_hooks(model).get("alora_offsets") or ()):
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


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that torch.autocast computes in now, and so that of keys and values; None outside of autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if known and torch.is_autocast_enabled(device.type) else None


def given_by_hooks(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that the caller's hooks pass to layers, one per row: PEFT's `adapter_names` and `alora_offsets`."""
    hooks = (hook for module in model.modules() for hook in list(module._forward_pre_hooks.values()))
    return {name: value for hook in hooks if isinstance(hook, partial) for name, value in hook.keywords.items()}


def rows_of(model: PreTrainedModel, *ids: int, least: int = 1) -> Tensor:
    """[row, length] int64: the same text in as many rows as the caller's hooks expect."""
    rows = len(given_by_hooks(model).get("adapter_names") or [0] * least)
    return torch.tensor([ids] * rows, device=device_of(model)) % embedding(model).shape[0]


def embedding(model: PreTrainedModel) -> Tensor:
    """[vocab, hidden]: the input embedding, or a tensor like it that holds no numbers.

    It is on the meta device while accelerate keeps it elsewhere.
    """
    weight = getattr(model.get_input_embeddings(), "weight", None)
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
