"""Prompts in any form, made token ids. One that cannot be decoded is refused by its index, with the cure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specdec.checks import as_ints, brief, wrong_kind

if TYPE_CHECKING:
    from specdec.models.target import Target

Prompt = Tensor | np.ndarray | Sequence[int] | str | Sequence[Mapping[str, Any]]
Prompts = Prompt | Sequence[Prompt]

_NO_PADDING = "pass 1-D tensors of token ids, one per prompt, without padding"
_ALONE = "pass the token ids alone, as [torch.tensor(ids) for ids in encoding['input_ids']]"
_CHAT = "of chat messages pass the list of them, [{'role': 'user', 'content': ...}]"
_ON_ERROR = ("raise", "skip")


def as_list(prompts: Any) -> list[Any]:
    """One prompt or several as a list of them, which is not empty."""
    if isinstance(prompts, (str, Tensor, np.ndarray)):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping, Set)) or not isinstance(prompts, Iterable):
        cure = _ALONE if isinstance(prompts, Mapping) else "pass token ids or text, or a list of such prompts"
        raise wrong_kind("prompts", prompts, cure)
    given = list(prompts)
    if not given:
        raise ValueError("prompts is an empty list; pass at least one prompt.")
    alone = all(isinstance(part, Integral) for part in given) or _is_chat(given)
    return [given] if alone else given


def as_prompts(
    given: Sequence[Any],
    budgets: Sequence[int],
    target: Target,
    tokenizer: Any,
    on_error: str = "raise",
    first_index: int = 0,
) -> tuple[dict[int, Tensor], dict[int, str]]:
    """The prompts that can be decoded, and why the others cannot, both by their places among those given.

    Args:
        given: prompts in any form, as `as_list` gives them.
        budgets: most new tokens of each.
        on_error: "raise" the error of the first prompt that cannot be decoded, or "skip" such prompts.
        first_index: index of the first one. Errors and messages name prompts by it.

    Returns:
        1-D int64 CPU tensors, and messages.

    Raises:
        ValueError: with on_error="raise", a prompt cannot be decoded.
    """
    if on_error not in _ON_ERROR:
        raise ValueError(f"on_error={brief(on_error)}: must be one of {', '.join(map(repr, _ON_ERROR))}.")
    prompts, skipped = {}, {}
    for i, (prompt, budget) in enumerate(zip(given, budgets, strict=True)):
        try:
            tokens = _as_tokens(prompt, first_index + i, tokenizer)
            _check_row(tokens, first_index + i, target, budget)
            prompts[i] = tokens
        except ValueError as error:
            if on_error == "raise":
                raise
            skipped[i] = str(error)
    return prompts, skipped


def _is_chat(prompt: Any) -> bool:
    """Whether it is a list of messages, each with a role."""
    listed = isinstance(prompt, (list, tuple)) and len(prompt) > 0
    return listed and all(isinstance(part, Mapping) and "role" in part for part in prompt)


def _chat_tokens(messages: Sequence[Any], index: int, tokenizer: Any) -> Any:
    """The messages in the tokenizer's chat template, which holds the BOS token if there is one."""
    if getattr(tokenizer, "chat_template", None) is None:
        lacking = (
            "there is no tokenizer" if tokenizer is None else f"the {type(tokenizer).__name__} has no chat template"
        )
        raise ValueError(
            f"prompt {index} is a list of messages but {lacking}; pass the tokenizer of a chat model, or text."
        )
    goes_on = messages[-1]["role"] == "assistant"
    with _of_prompt(index):
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=not goes_on, continue_final_message=goes_on, return_dict=False
        )


@contextmanager
def _of_prompt(index: int) -> Iterator[None]:
    """Name the prompt in whatever its tokenizer raises."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {error}".rstrip(".")
        raise ValueError(f"prompt {index} cannot be tokenised ({why}); correct it, or pass token ids.") from error


def _as_tokens(prompt: Any, index: int, tokenizer: Any) -> Tensor:
    if _is_chat(prompt):
        prompt = _chat_tokens(prompt, index, tokenizer)
    if isinstance(prompt, str):
        if not callable(tokenizer):
            lacking = "there is no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__} reads none"
            raise ValueError(f"prompt {index} is text but {lacking}; pass tokenizer=... or token ids.")
        with _of_prompt(index):
            encoding: Any = tokenizer(prompt)
            prompt = encoding["input_ids"]
    if isinstance(prompt, np.ndarray) and prompt.dtype.kind in "biuf":
        prompt = torch.from_numpy(np.ascontiguousarray(prompt))
    if isinstance(prompt, (list, tuple, range)):
        return torch.tensor(as_ints(f"prompt {index}", prompt, cure=_NO_PADDING), dtype=torch.int64)
    if not isinstance(prompt, Tensor) or prompt.dim() != 1:
        got = f"a tensor of shape {list(prompt.shape)}" if isinstance(prompt, Tensor) else f"a {type(prompt).__name__}"
        cure = f"{_CHAT}, else {_NO_PADDING}" if isinstance(prompt, Mapping) else _NO_PADDING
        raise ValueError(f"prompt {index} is {got}; {cure}. Got {brief(prompt)}.")
    if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
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
        cure = f"shorten it or set max_new_tokens to at most {limit - len(row)}"
        if len(row) >= limit:
            cure = f"shorten the prompt to at most {limit - 1} tokens"
        raise ValueError(
            f"prompt {index} has {len(row)} tokens, and {max_new_tokens} new ones would exceed the target's context of "
            f"{limit}{target.context_reason}; {cure}."
        )
