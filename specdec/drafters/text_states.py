"""What a target says of whole texts, in plain forward passes: its states, and its logits of those that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def read_texts(model: PreTrainedModel, tokens: Tensor, which: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The target's states [batch, t, state, hidden] over texts [batch, t] int64 of one length, and what its LM head reads.

    In a plain forward pass, by transformers' own `output_hidden_states`. Logits [batch, t, vocab] are not computed here: see
    `logits_of`.
    """
    read: list[Tensor] = []

    def last_only(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read.append(args[0])
        return (args[0][:, -1:],)

    with _before_head(model, last_only):
        out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    return torch.stack([read[0] if index == -1 else out.hidden_states[index] for index in which], 2), read[0]


@torch.no_grad()
def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[batch, n, vocab]: the model's logits, where its LM head reads `hidden` [batch, n, hidden].

    They are those of a forward pass over one token whose head is given these states, so whatever the model does to its logits
    (a scale, a cap) is done to them.
    """
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with _before_head(model, lambda _, args: (hidden.to(args[0]),)):
        return model(input_ids=one, use_cache=False).logits.to(hidden.device)


@contextmanager
def _before_head(model: PreTrainedModel, change: Callable[[Any, tuple[Tensor, ...]], Any]) -> Iterator[None]:
    head: Any = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(change)
    try:
        yield
    finally:
        hook.remove()
