"""What a target says of whole texts, in plain forward passes: its states, and its logits of those that are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.models.ready import check_ready


@torch.no_grad()
def read_texts(model: PreTrainedModel, tokens: Tensor, which: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The target's states [batch, t, state, hidden] over texts [batch, t] int64 of one length, and what its LM head reads.

    In a plain forward pass, by transformers' own `output_hidden_states`. Logits [batch, t, vocab] are not computed here: see
    `logits_of`.
    """
    check_ready(model)
    read: list[Tensor] = []

    def last_only(hidden: Tensor) -> Tensor:
        read.append(hidden)
        return hidden[:, -1:]

    with _before_head(model, last_only):
        out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    hidden = read[0].to(tokens.device)
    states = [hidden if index == -1 else out.hidden_states[index].to(tokens.device) for index in which]
    return torch.stack(states, 2), hidden


@torch.no_grad()
def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[batch, n, vocab]: the model's logits, where its LM head reads `hidden` [batch, n, hidden].

    They are those of a forward pass over one token whose head is given these states, so whatever the model does to its logits
    (a scale, a cap) is done to them.
    """
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    # Of part of a tensor torch would compute the product row by row of the batch, with a copy of the LM head for each.
    hidden = hidden.contiguous()
    with _before_head(model, hidden.to):
        return model(input_ids=one, use_cache=False).logits.to(hidden.device)


@contextmanager
def _before_head(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the LM head reads what `change` makes of its input, in passes of this thread; others may run the model, too."""
    head: Any = model.get_output_embeddings()
    mine = threading.get_ident()

    # without `named` when another thread meets the hook just as it is removed
    def changed(_: Any, args: tuple[Any, ...], named: dict[str, Any] | None = None) -> Any:
        if threading.get_ident() != mine:
            return None
        (hidden,) = (*args, *(named or {}).values())
        return (change(hidden),), {}

    hook = head.register_forward_pre_hook(changed, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
