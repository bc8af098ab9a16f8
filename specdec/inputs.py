"""What users pass, checked and put into one form. Every refusal states the value, the limit and the cure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.target import ModelTarget, Target

Prompts = Tensor | str | Sequence[Tensor] | Sequence[str]


def as_target(target: PreTrainedModel | Target) -> Target:
    """The target itself, or the machinery around a transformers model."""
    if isinstance(target, Target):
        return target
    if isinstance(target, PreTrainedModel):
        return ModelTarget(target)
    raise ValueError(f"target is a {type(target).__name__}; pass a transformers PreTrainedModel (or a specdec Target).")


def as_prompts(prompts: Prompts, tokenizer: Any, target: Target, max_new_tokens: int) -> list[Tensor]:
    """Prompts as 1-D int64 CPU tensors, each checked against the target."""
    if isinstance(prompts, (str, Tensor)):
        prompts = [prompts]  # type: ignore[assignment]
    if len(prompts) == 0:
        raise ValueError("prompts is an empty list; pass at least one prompt.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be >= 1.")
    rows = [_as_tokens(prompt, i, tokenizer) for i, prompt in enumerate(prompts)]
    for i, row in enumerate(rows):
        _check_row(row, i, target, max_new_tokens)
    return rows


def as_stop_tokens(stop_tokens: Sequence[int] | None, default: Sequence[int], vocab: int) -> tuple[int, ...]:
    """Token ids that end a text; `default` when not given."""
    tokens = tuple(int(t) for t in (default if stop_tokens is None else stop_tokens))
    if stop_tokens is not None and (bad := [t for t in tokens if not 0 <= t < vocab]):
        raise ValueError(f"stop_tokens={bad} are no token ids: the vocabulary has ids 0 to {vocab - 1}.")
    return tokens


def _as_tokens(prompt: Any, index: int, tokenizer: Any) -> Tensor:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"prompt {index} is text but there is no tokenizer; pass tokenizer=... or token ids.")
        prompt = torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.int64)
    if not isinstance(prompt, Tensor) or prompt.dim() != 1:
        got = f"a tensor of shape {list(prompt.shape)}" if isinstance(prompt, Tensor) else f"a {type(prompt).__name__}"
        raise ValueError(f"prompt {index} is {got}; pass 1-D tensors of token ids, one per prompt, without padding.")
    if prompt.dtype.is_floating_point or prompt.dtype == torch.bool:
        raise ValueError(f"prompt {index} has dtype {prompt.dtype}; token ids are integers (int64).")
    return prompt.detach().to("cpu", torch.int64)


def _check_row(row: Tensor, index: int, target: Target, max_new_tokens: int) -> None:
    if len(row) == 0:
        raise ValueError(f"prompt {index} is empty; give at least one token (for example the BOS token).")
    low, high = int(row.min()), int(row.max())
    if low < 0 or high >= target.vocab:
        bad = low if low < 0 else high
        raise ValueError(
            f"prompt {index} contains token id {bad}; the target's vocabulary has ids 0 to {target.vocab - 1}."
        )
    limit = target.context_length
    if limit is not None and len(row) + max_new_tokens > limit:
        raise ValueError(
            f"prompt {index} has {len(row)} tokens, and {max_new_tokens} new ones would exceed the target's context of "
            f"{limit}; shorten it or set max_new_tokens to at most {max(limit - len(row), 0)}."
        )
