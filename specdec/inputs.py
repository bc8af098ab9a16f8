"""What users pass, checked and put into one form. Every refusal states the value, the limit and the cure."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specdec.engine import Engine
from specdec.graphs import Graphs
from specdec.support import cure_for
from specdec.target import ModelTarget, Target

Prompts = Tensor | str | Sequence[Tensor] | Sequence[str]


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless `value` is a `kind`."""
    if isinstance(value, kind):
        return
    if isinstance(value, type):
        raise ValueError(f"{name} is the class {value.__name__}; pass an instance, {value.__name__}(...).")
    cures = {
        PreTrainedModel: "wrap a draft model: ModelDrafter(model)",
        GenerationConfig: "convert it: Sampling.from_generation_config(config)",
    }
    cure = next((cure for other, cure in cures.items() if isinstance(value, other)), f"pass a specdec {kind.__name__}")
    raise ValueError(f"{name} is a {type(value).__name__}; {cure}.")


def as_int(name: str, value: Any) -> int:
    """`value` as a Python integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: must be an integer.") from None


def as_target(target: PreTrainedModel | Target, resume: bool = False) -> Target:
    """The target itself, or the machinery around a transformers model: new each time, so that no run can be resumed."""
    if isinstance(target, Target):
        if not hasattr(target, "vocab"):
            raise ValueError(f"{type(target).__name__} has no attribute vocab; set it to the size of the vocabulary.")
        return target
    if isinstance(target, PreTrainedModel):
        if resume:
            cure = "make target = specdec.ModelTarget(model) once and pass it to every call"
            raise ValueError(f"resume=True with a {type(target).__name__}, which keeps nothing between calls; {cure}.")
        return ModelTarget(target)
    raise ValueError(f"target is a {type(target).__name__}; {cure_for(target)} (or a specdec Target).")


def as_engine(engine: Engine | str) -> Engine:
    """The engine itself, or a new one of that name."""
    if isinstance(engine, Engine):
        return engine
    made = {"eager": Engine, "graph": Graphs, "compile": partial(Graphs, compile=True)}
    if engine not in made:
        raise ValueError(f"engine={engine!r}: must be one of {', '.join(map(repr, made))}, or a specdec.Graphs().")
    return made[engine]()


def as_prompts(prompts: Prompts, tokenizer: Any, target: Target, max_new_tokens: int) -> list[Tensor]:
    """Prompts as 1-D int64 CPU tensors, each checked against the target."""
    if isinstance(prompts, (str, Tensor)):
        prompts = [prompts]  # type: ignore[assignment]
    if isinstance(prompts, Mapping):
        cure = "pass the token ids alone, as [torch.tensor(ids) for ids in encoding['input_ids']]"
        raise ValueError(f"prompts is a {type(prompts).__name__}; {cure}.")
    given = list(prompts)
    if not given:
        raise ValueError("prompts is an empty list; pass at least one prompt.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be >= 1.")
    rows = [_as_tokens(prompt, i, tokenizer) for i, prompt in enumerate(given)]
    for i, row in enumerate(rows):
        _check_row(row, i, target, max_new_tokens)
    return rows


def as_stop_tokens(stop_tokens: Any, eos: Any, vocab: int) -> tuple[int, ...]:
    """Token ids that end a text; those of a generation config's eos_token_id when not given."""
    given = stop_tokens is not None
    wanted = stop_tokens if given else () if eos is None else eos
    several = isinstance(wanted, Iterable) and not isinstance(wanted, str) and getattr(wanted, "ndim", 1)
    tokens = tuple(as_int("stop_tokens", t) for t in (wanted if several else [wanted]))
    if given and (bad := [t for t in tokens if not 0 <= t < vocab]):
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
        reason = f" ({target.context_reason})" if target.context_reason else ""
        raise ValueError(
            f"prompt {index} has {len(row)} tokens, and {max_new_tokens} new ones would exceed the target's context of "
            f"{limit}{reason}; shorten it or set max_new_tokens to at most {max(limit - len(row), 0)}."
        )
