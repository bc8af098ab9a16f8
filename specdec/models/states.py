"""The target's states, noted while it scores: what EAGLE-like drafters and Medusa heads read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class _Pass(threading.local):
    """The pass that a thread is in."""

    def __init__(self) -> None:  # not class attributes: torch.compile takes those to be the same in every thread
        self.found: list[Tensor] | None = None  # states so far, in the order in which the model computes them
        self.keep = 0  # how many nodes get logits


_pass = _Pass()


# Functions of the module, not closures, as torch.compile can follow these. They ignore passes of other threads, which may meet
# them when they are just being removed, and then call them without `named`.
# The hidden states come first, by place or by name. Copies are noted, as a model may change its states in place.
def _catch(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any] | None = None) -> None:
    if _pass.found is not None:
        _pass.found.append([*args, *(named or {}).values()][0].clone())


def _catch_before_head(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any] | None = None) -> Any:
    if _pass.found is not None:
        (hidden,) = (*args, *(named or {}).values())
        _pass.found.append(hidden.clone())
        return (hidden[:, -_pass.keep :],), {}


class Capture:
    """Notes a model's states in `states`, pass by pass; it does nothing if none are asked for.

    Args:
        model: the model.
        which: i >= 0 for the residual stream before layer i (0: what the embedding gives), -1 for what the LM head reads.
        device: where the states are wanted; layers may be on other devices.
    """

    def __init__(self, model: PreTrainedModel, which: Sequence[int], device: torch.device):
        self.which, self._device = tuple(which), device
        self._met = sorted(set(which), key=lambda index: (index < 0, index))  # the head comes last
        self._order = [self._met.index(index) for index in which]
        self.look_up(model)
        self.states: Tensor | None = None  # [batch, count, state, hidden] of the last pass

    def look_up(self, model: PreTrainedModel) -> None:
        """Find the modules to listen to: between runs some may have been replaced."""
        self._hooked = [(_place(model, index), _catch if index >= 0 else _catch_before_head) for index in self._met]

    @contextlib.contextmanager
    def of_pass(self, keep: int) -> Iterator[None]:
        """Note the states of the forward pass inside this context, in which the last `keep` nodes get logits."""
        if not self.which:
            yield
            return
        for place in self._hooked:
            _hook(*place)
        _pass.found, _pass.keep = [], keep
        try:
            yield
            found = _pass.found
        finally:
            _pass.found = None
            for place in self._hooked:
                _unhook(*place)
        self.states = torch.stack([found[place].to(self._device) for place in self._order], 2)


_lock = threading.Lock()  # guards `_hooks`
# From (module, hook) to its handle and the number of passes that need it. Each hook is registered once.
_hooks: dict[Any, tuple[Any, int]] = {}


def _hook(module: nn.Module, hook: Any) -> None:
    with _lock:
        handle, users = _hooks.get((module, hook), (None, 0))
        _hooks[module, hook] = handle or module.register_forward_pre_hook(hook, with_kwargs=True), users + 1


def _unhook(module: nn.Module, hook: Any) -> None:
    with _lock:
        handle, users = _hooks.pop((module, hook))
        if users > 1:
            _hooks[module, hook] = handle, users - 1
        else:
            handle.remove()


def _place(model: PreTrainedModel, index: int) -> nn.Module:
    """The module whose input is state `index`."""
    if index == -1:
        # Not the base model's output: OPT's own forward pass goes around it, and Llama 4 names none.
        return model.get_output_embeddings()  # type: ignore[return-value] - every supported model has one
    layers = decoder_layers(model)
    if not 0 <= index < len(layers):
        raise ValueError(
            f"states={index}: {type(model).__name__} has layers 0 to {len(layers) - 1}; give the number of a layer for what it "
            "reads, or -1 for what the LM head reads."
        )
    return layers[index]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers, in order; raises ValueError unless the model runs each of them once."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    parts = {part for outer in lists for part in outer.modules() if part is not outer}  # lists inside of layers
    found = next((m for m in lists if len(m) == count and m not in parts), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no list of the {count} layers that its cache is for (it may run some of them more "
            "than once), so its layers cannot be left out or listened to; use another drafter, such as NgramDrafter()."
        )
    return found
