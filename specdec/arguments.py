"""What users pass to a run, checked and put into one form. Every refusal states the value, the limit and the cure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specdec.checks import as_int, as_ints, brief, wrong_kind
from specdec.engines.base import Engine
from specdec.engines.graphs import Graphs
from specdec.models.probe import cure_for
from specdec.models.target import ModelTarget, Target
from specdec.sampling import Sampling
from specdec.tree import TreeSpec

Prompt = Tensor | np.ndarray | Sequence[int] | str
Prompts = Prompt | Sequence[Prompt]

_NO_PADDING = "pass 1-D tensors of token ids, one per prompt, without padding"
_ALONE = "pass the token ids alone, as [torch.tensor(ids) for ids in encoding['input_ids']]"
_CHAT = "of chat messages pass tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)"
# arguments of other libraries whose names do not say which one is meant here
_ELSEWHERE = {
    "do_sample": "pass sampling=specdec.Sampling(temperature=1.0) to sample, Sampling() for greedy decoding",
    "generation_config": "pass sampling=specdec.Sampling.from_generation_config(config)",
    "logits_processor": "pass sampling=specdec.Sampling(processors=[...])",
    "max_length": "pass max_new_tokens, which does not count the prompt",
    "num_beams": "only greedy decoding and sampling can be drafted for; leave it out",
    "num_return_sequences": "pass the prompt so many times",
    "input_ids": "pass the token ids as prompts",
    "inputs": "pass the token ids as prompts",
    "attention_mask": "leave it out, and pass prompts without padding",
    "eos_token_id": "pass stop_tokens",
    "stop": "pass stop_tokens, which are ids",
    "stop_strings": "pass sampling=specdec.Sampling.from_generation_config(GenerationConfig(stop_strings=...)) and tokenizer",
    "stopping_criteria": "call model.generate(custom_generate=specdec.custom_generate(drafter))",
    "streamer": "iterate over specdec.stream(...), or call model.generate(custom_generate=specdec.custom_generate(drafter))",
    "assistant_model": "pass drafter=specdec.drafters.ModelDrafter(assistant_model)",
    "tree": "pass it to the drafter, as in ModelDrafter(model, tree)",
}  # fmt: skip


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ValueError if there are arguments that `generate` does not know, and say where each of them belongs."""
    if given:
        cures = "; ".join(f"{name}={brief(value)}: {_home(name, value, list(known))}" for name, value in given.items())
        raise ValueError(f"generate and stream have no such argument: {cures}.")


def _home(name: str, value: Any, known: Sequence[str]) -> str:
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    if name in {field.name for field in fields(Sampling)}:
        sampled = "" if name in ("temperature", "processors") else "temperature=1.0, "
        return f"pass sampling=specdec.Sampling({sampled}{name}={brief(value)})"
    if close := get_close_matches(name, known, n=1):
        return f"did you mean {close[0]!r}?"
    if hasattr(GenerationConfig(), name):
        config = f"GenerationConfig({name}={brief(value)})"
        return f"pass sampling=specdec.Sampling.from_generation_config({config})"
    return f"there are {', '.join(known)}"


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
        made = ModelTarget(target)
        made.kept = False
        return made
    raise wrong_kind("target", target, f"{cure_for(target)} (or a specdec Target)")


def as_engine(engine: Engine | str) -> Engine:
    """The engine itself, or a new one of that name."""
    if isinstance(engine, Engine):
        return engine
    made = {"eager": Engine, "graph": Graphs, "compile": partial(Graphs, compile=True)}
    if not isinstance(engine, str) or engine not in made:
        raise ValueError(f"engine={brief(engine)}: must be one of {', '.join(map(repr, made))}, or a specdec.Graphs().")
    return made[engine]()


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError unless it is None or can write text; whether it reads any is seen when a prompt is text."""
    if tokenizer is None or (hasattr(tokenizer, "decode") and not isinstance(tokenizer, bytes)):
        return
    raise wrong_kind("tokenizer", tokenizer, "pass one of transformers, such as AutoTokenizer.from_pretrained(name)")


def check_clock(spec: TreeSpec, model: PreTrainedModel | None) -> None:
    """Raise ValueError where every process of a model that is cut over several would draft by its own clock."""
    processes = getattr(model, "tp_size", None) or 1
    if spec.by_clock and processes > 1:
        raise ValueError(
            f"Trees are chosen by measured times, and {processes} processes that share this model would wait for each other "
            "with different ones; give the same times to all of them, Adaptive(costs=...)."
        )


def as_prompts(prompts: Prompts, tokenizer: Any, target: Target, max_new_tokens: int) -> list[Tensor]:
    """Prompts as 1-D int64 CPU tensors, each checked against the target."""
    given = _as_list(prompts)
    if not given:
        raise ValueError("prompts is an empty list; pass at least one prompt.")
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


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or several as a list of them."""
    if isinstance(prompts, (str, Tensor, np.ndarray)):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping, Set)) or not isinstance(prompts, Iterable):
        cure = _ALONE if isinstance(prompts, Mapping) else "pass token ids or text, or a list of such prompts"
        raise wrong_kind("prompts", prompts, cure)
    given = list(prompts)
    return [given] if given and all(isinstance(part, Integral) for part in given) else given


def _as_tokens(prompt: Any, index: int, tokenizer: Any) -> Tensor:
    if isinstance(prompt, str):
        if not callable(tokenizer):
            lacking = "there is no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__} reads none"
            raise ValueError(f"prompt {index} is text but {lacking}; pass tokenizer=... or token ids.")
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
