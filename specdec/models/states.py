"""The target's states, noted while it scores: what EAGLE-like drafters and Medusa heads read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Capture:
    """Forward passes inside leave their states in `states`; it does nothing if none are asked for.

    Args:
        model: the model.
        which: i >= 0 for the residual stream before layer i (0: what the embedding gives), -1 for what the LM head reads.
        device: where the states are wanted; of a model over several devices, layers are on others.
    """

    def __init__(self, model: PreTrainedModel, which: Sequence[int], device: torch.device):
        self._device = device
        self._modules = [_place(model, index) for index in which]
        self._hooks = [partial(self._note, place, index < 0) for place, index in enumerate(which)]
        self._found: list[Tensor] = []
        self._keep: int | None = None
        self.states: Tensor | None = None  # [batch, count, state, hidden] of the last pass
        self.all_logits = -1 in which  # the LM head has to be handed all nodes, though few of its logits may be wanted

    @contextlib.contextmanager
    def of_pass(self, logits_to_keep: int) -> Iterator[None]:
        """Note the states of the pass inside, in which the LM head computes this many of the last logits."""
        self._found, self._keep = [torch.empty(0)] * len(self._hooks), logits_to_keep
        with contextlib.ExitStack() as stack:
            for module, hook in zip(self._modules, self._hooks, strict=True):
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield
        if self._hooks:
            self.states = torch.stack([part.to(self._device) for part in self._found], 2)

    def _note(self, place: int, before_head: bool, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._found[place] = states = args[0] if args else kwargs["hidden_states"]
        return ((states[:, -self._keep :], *args[1:]), kwargs) if before_head and self._keep else None


def _place(model: PreTrainedModel, index: int) -> nn.Module:
    """The module whose input is state `index`."""
    if index == -1:
        # not the base model's output: OPT's own forward pass goes around it, and Llama 4 names none
        return model.get_output_embeddings()  # type: ignore[return-value] - any that is supported has one
    layers = decoder_layers(model)
    if not 0 <= index < len(layers):
        raise ValueError(
            f"states={index}: {type(model).__name__} has layers 0 to {len(layers) - 1}; give the number of a layer for what it "
            "reads, or -1 for what the LM head reads."
        )
    return layers[index]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers, in order; raises ValueError if it does not run each of them once."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    parts = {part for outer in lists for part in outer.modules() if part is not outer}  # of a layer
    found = next((m for m in lists if len(m) == count and m not in parts), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no list of the {count} layers that its cache is for (it may run some of them more "
            "than once), so its layers cannot be left out or listened to; use another drafter, such as NgramDrafter()."
        )
    return found
