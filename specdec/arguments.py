"""The arguments of a run, checked and put into one form. Every refusal states the value, the limit and the cure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from inspect import signature
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specdec.checks import as_int, as_ints, as_seed, brief, check_kind, wrong_kind
from specdec.drafters import Drafter, NoDrafter
from specdec.engines.base import Engine
from specdec.engines.graphs import Graphs
from specdec.huggingface.stopping import StopStrings
from specdec.models.probe import cure_for
from specdec.models.target import ModelTarget, Target
from specdec.notes import logprob, raw_logprob
from specdec.request import Request, Text
from specdec.rules import Rule, SiblingRejection
from specdec.runs import Runs
from specdec.sampling import Sampling
from specdec.trace import LEVELS
from specdec.tree import TreeSpec

Prompt = Tensor | np.ndarray | Sequence[int] | str | Sequence[Mapping[str, Any]]
Prompts = Prompt | Sequence[Prompt]

_UNDRAFTED = NoDrafter()  # always the same one, so that graphs captured in one run serve the next
_EAGER = Engine()
_NO_PADDING = "pass 1-D tensors of token ids, one per prompt, without padding"
_ALONE = "pass the token ids alone, as [torch.tensor(ids) for ids in encoding['input_ids']]"
_ON_ERROR = ("raise", "skip")
_CHAT = "of chat messages pass the list of them, [{'role': 'user', 'content': ...}]"
_SAMPLE_KEYS = 2**32  # indices of prompts are below it, so that sample j of prompt i has the key i + j * 2**32
_SAMPLES = 2**30
# What to pass here for arguments of other libraries.
_ELSEWHERE = {
    "do_sample": "pass sampling=specdec.Sampling(temperature=1.0) to sample, Sampling() for greedy decoding",
    "generation_config": "pass sampling=specdec.Sampling.from_generation_config(config)",
    "logits_processor": "pass sampling=specdec.Sampling(processors=[...])",
    "max_length": "pass max_new_tokens, which does not count the prompt",
    "num_beams": "only greedy decoding and sampling can be drafted for; leave it out",
    "num_return_sequences": "pass num_samples",
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


def as_request(
    target: PreTrainedModel | Target,
    prompts: Prompts,
    drafter: Drafter | None = None,
    *,
    rule: Rule = SiblingRejection(),
    sampling: Sampling = Sampling(),
    max_new_tokens: int | Sequence[int] = 128,
    stop_tokens: Iterable[int] | int | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    first_index: int = 0,
    num_samples: int = 1,
    batch_size: int | None = None,
    on_error: str = "raise",
    logprobs: bool = False,
    trace: str = "summary",
    engine: Engine | str = "eager",
    resume: Any = None,
    keep: bool = False,
    **unknown: Any,
) -> Request:
    """Check the arguments of `specdec.generate`, also against each other, before anything is run.

    Raises:
        ValueError: as `generate` does.
    """
    began = time.perf_counter()
    refuse_unknown(unknown)
    if trace not in LEVELS:
        raise ValueError(f"trace={trace!r}: must be one of {', '.join(map(repr, LEVELS))}.")
    made_engine, drafter = as_engine(engine), _UNDRAFTED if drafter is None else drafter
    for name, part, kind in (("drafter", drafter, Drafter), ("rule", rule, Rule), ("sampling", sampling, Sampling)):
        check_kind(name, part, kind)
    for name, flag in (("keep", keep), ("logprobs", logprobs)):
        check_kind(name, flag, bool, "pass True or False")
    check_tokenizer(tokenizer)
    seed, last, found = as_seed(seed), as_last(resume), as_target(target)
    slots = None if batch_size is None else as_int("batch_size", batch_size, 1, cure="None decodes all at once")
    if slots is not None and (keep or last is not None):
        raise ValueError(
            f"batch_size={batch_size} with {'keep' if keep else 'resume'}: rows pass from text to text, so there are no caches "
            "to go on in; leave batch_size out for conversations."
        )
    samples = as_int("num_samples", num_samples, 1, _SAMPLES)
    given = as_list(prompts)
    keys, budgets = as_keys(first_index, given, samples), as_budgets(max_new_tokens, len(given))
    read, unread = as_prompts(given, budgets, found, tokenizer, on_error)
    places = [i * samples + j for i in read for j in range(samples)]
    rows, lefts = [read[i // samples] for i in places], [budgets[i // samples] for i in places]
    bound, processors = sampling.bind(found.model, rows, lefts, tokenizer)
    spec = drafter.spec(bound)
    rule.check(spec)
    check_clock(spec, found.model)
    config = bound.generation_config
    eos, strings = (found.stop_tokens, None) if config is None else (config.eos_token_id, config.stop_strings)
    stop = as_stop_tokens(stop_tokens, eos, found.vocab)
    stopping = StopStrings(tokenizer, strings) if strings else None
    texts = [
        Text(i, tokens.numpy(), len(tokens), left, keys[i], processors=own)
        for i, tokens, left, own in zip(places, rows, lefts, processors, strict=True)
    ]
    skipped = {i * samples + j: reason for i, reason in unread.items() for j in range(samples)}
    return Request(
        found, drafter, rule, made_engine, bound, spec, texts, {}, skipped, slots, stop, stopping, tokenizer, seed, trace,
        (logprob, raw_logprob) if logprobs else (), last, keep, None, began,
    )  # fmt: skip


def as_keys(first_index: Any, prompts: Sequence[Tensor], samples: int) -> list[int]:
    """What the coins of each text are drawn by: each sample of each prompt has its own, whatever else is asked for."""
    first = as_int("first_index", first_index, 0, _SAMPLE_KEYS - len(prompts))
    return [first + i + j * _SAMPLE_KEYS for i in range(len(prompts)) for j in range(samples)]


def as_last(resume: Any) -> Runs | None:
    """The runs that the generation to be resumed has kept."""
    if resume is None:
        return None
    runs = getattr(resume, "runs", resume)
    if isinstance(runs, Runs):
        return runs
    if hasattr(resume, "runs"):
        raise ValueError("resume is a generation that has kept nothing; generate it with keep=True.")
    raise wrong_kind("resume", resume, "pass the generation to go on from, which was made with keep=True")


def refuse_unknown(given: Mapping[str, Any]) -> None:
    """Raise ValueError if there are arguments that `generate` does not know, and say where each of them belongs."""
    if given:
        cures = "; ".join(f"{name}={brief(value)}: {_home(name, value)}" for name, value in given.items())
        raise ValueError(f"generate and stream have no such argument: {cures}.")


def _home(name: str, value: Any) -> str:
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    if name in {field.name for field in fields(Sampling)}:
        sampled = "" if name in ("temperature", "processors") else "temperature=1.0, "
        return f"pass sampling=specdec.Sampling({sampled}{name}={brief(value)})"
    if close := get_close_matches(name, _KNOWN, n=1):
        return f"did you mean {close[0]!r}?"
    if hasattr(GenerationConfig(), name):
        config = f"GenerationConfig({name}={brief(value)})"
        return f"pass sampling=specdec.Sampling.from_generation_config({config})"
    return f"there are {', '.join(_KNOWN)}"


def as_target(target: PreTrainedModel | Target) -> Target:
    """The target itself, or one made of a transformers model."""
    if isinstance(target, Target):
        if not hasattr(target, "vocab"):
            raise ValueError(f"{type(target).__name__} has no attribute vocab; set it to the size of the vocabulary.")
        return target
    if isinstance(target, PreTrainedModel):
        return ModelTarget(target)
    raise wrong_kind("target", target, f"{cure_for(target)} (or a specdec Target)")


def as_engine(engine: Engine | str) -> Engine:
    """The engine itself, or one of that name; a new one if the engine keeps anything."""
    if isinstance(engine, Engine):
        return engine
    made = {"eager": lambda: _EAGER, "graph": Graphs, "compile": partial(Graphs, compile=True)}
    if not isinstance(engine, str) or engine not in made:
        raise ValueError(f"engine={brief(engine)}: must be one of {', '.join(map(repr, made))}, or a specdec.Graphs().")
    return made[engine]()


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError unless the tokenizer is None or can decode. Whether it can encode is checked when a prompt is text."""
    if tokenizer is None or (hasattr(tokenizer, "decode") and not isinstance(tokenizer, bytes)):
        return
    raise wrong_kind("tokenizer", tokenizer, "pass one of transformers, such as AutoTokenizer.from_pretrained(name)")


def check_clock(spec: TreeSpec, model: PreTrainedModel | None) -> None:
    """Raise ValueError if several processes share the model and each would draft by its own clock."""
    processes = getattr(model, "tp_size", None) or 1
    if spec.by_clock and processes > 1:
        raise ValueError(
            f"Trees are chosen by measured times, and {processes} processes that share this model would wait for each other "
            "with different ones; give the same times to all of them, Paused(drafter, seconds=...)."
        )


def as_prompts(
    given: Sequence[Any], budgets: Sequence[int], target: Target, tokenizer: Any, on_error: str = "raise"
) -> tuple[dict[int, Tensor], dict[int, str]]:
    """The prompts that can be decoded, and why the others cannot, both by their places among those given.

    Args:
        given: prompts in any form, as `as_list` gives them.
        budgets: most new tokens of each.
        on_error: "raise" the error of the first prompt that cannot be decoded, or "skip" such prompts.

    Returns:
        1-D int64 CPU tensors, and messages.

    Raises:
        ValueError: a prompt cannot be decoded, or with on_error="skip" none can.
    """
    if on_error not in _ON_ERROR:
        raise ValueError(f"on_error={brief(on_error)}: must be one of {', '.join(map(repr, _ON_ERROR))}.")
    prompts, skipped = {}, {}
    for i, (prompt, budget) in enumerate(zip(given, budgets, strict=True)):
        try:
            tokens = _as_tokens(prompt, i, tokenizer)
            _check_row(tokens, i, target, budget)
            prompts[i] = tokens
        except ValueError as error:
            if on_error == "raise":
                raise
            skipped[i] = str(error)
    if not prompts:
        raise ValueError(f"every prompt would be skipped, {len(skipped)} in all; the first one because {skipped[0]}")
    return prompts, skipped


def as_budgets(max_new_tokens: Any, prompts: int) -> list[int]:
    """Most new tokens of each of so many prompts."""
    if (
        isinstance(max_new_tokens, Iterable)
        and getattr(max_new_tokens, "ndim", 1)
        and not isinstance(max_new_tokens, str)
    ):
        budgets = list(as_ints("max_new_tokens", max_new_tokens, 1))
        if len(budgets) != prompts:
            raise ValueError(
                f"max_new_tokens has {len(budgets)} numbers for {prompts} prompts; pass one for each, or one for all."
            )
        return budgets
    return [as_int("max_new_tokens", max_new_tokens, 1)] * prompts


def as_stop_tokens(stop_tokens: Any, eos: Any, vocab: int) -> tuple[int, ...]:
    """Token ids that end a text; those of a generation config's eos_token_id when not given."""
    given = stop_tokens is not None
    wanted = stop_tokens if given else () if eos is None else eos
    several = isinstance(wanted, Iterable) and not isinstance(wanted, str) and getattr(wanted, "ndim", 1)
    tokens = tuple(as_int("stop_tokens", t) for t in (wanted if several else [wanted]))
    if given and (bad := [t for t in tokens if not 0 <= t < vocab]):
        raise ValueError(f"stop_tokens={bad} are no token ids: the vocabulary has ids 0 to {vocab - 1}.")
    return tokens


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


_KNOWN = [*(name for name in signature(as_request).parameters if name != "unknown"), "journal", "progress"]
