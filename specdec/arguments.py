"""The arguments of a run, checked and put into one form. Every refusal states the value, the limit and the cure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from inspect import signature
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from specdec.checks import as_int, as_ints, as_seed, brief, check_flag, check_kind, wrong_kind
from specdec.drafters import Drafter, NoDrafter
from specdec.engines.base import Engine
from specdec.engines.graphs import Graphs
from specdec.huggingface.stopping import StopStrings
from specdec.models.ready import cure_for
from specdec.models.target import ModelTarget, Target
from specdec.notes import logprob, raw_logprob
from specdec.prompts import Prompts, as_list, as_prompts
from specdec.request import Request, Text
from specdec.rules import Rule, SiblingRejection
from specdec.runs import Runs
from specdec.sampling import Sampling
from specdec.trace import LEVELS
from specdec.tree import TreeSpec

_UNDRAFTED = NoDrafter()  # always the same one, so that graphs captured in one run serve the next
_EAGER = Engine()
_SAMPLE_KEYS = 2**32  # indices of prompts are below it, so that sample j of prompt i has the key i + j * 2**32
_SAMPLES = 2**30
# What to pass here for arguments of other libraries.
_ELSEWHERE = {
    "best_of": "pass num_samples",
    "do_sample": "pass sampling=specdec.Sampling(temperature=1.0) to sample, Sampling() for greedy decoding",
    "generation_config": "pass sampling=specdec.Sampling.from_generation_config(config)",
    "logits_processor": "pass sampling=specdec.Sampling(processors=[...])",
    "max_length": "pass max_new_tokens, which does not count the prompt",
    "num_beams": "only greedy decoding and sampling can be drafted for; leave it out",
    "n": "pass num_samples",
    "num_return_sequences": "pass num_samples",
    "input_ids": "pass the token ids as prompts",
    "inputs": "pass the token ids as prompts",
    "attention_mask": "leave it out, and pass prompts without padding",
    "eos_token_id": "pass stop_tokens",
    "output_logits": "pass logprobs=True, or call model.generate(custom_generate=...)",
    "output_scores": "pass logprobs=True, or call model.generate(custom_generate=...)",
    "price_per_hour": "pass it to Generation.summary",
    "prompt_logprobs": "only new tokens have them; leave it out",
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
    check_flag("keep", keep)
    check_flag("logprobs", logprobs)
    check_tokenizer(tokenizer)
    seed, last, found = as_seed(seed), as_last(resume), as_target(target)
    slots = as_slots(batch_size, keep, last)
    samples = as_int("num_samples", num_samples, 1, _SAMPLES, cure="it is how many texts to write for each prompt")
    given = as_list(prompts)
    most = _SAMPLE_KEYS - len(given)
    first = as_int("first_index", first_index, 0, most, cure="it is how many prompts come before these")
    budgets = as_budgets(max_new_tokens, len(given))
    read, unread = as_prompts(given, budgets, found, tokenizer, on_error, first)
    places = [(i, j) for i in read for j in range(samples)]
    rows, lefts = [read[i] for i, _ in places], [budgets[i] for i, _ in places]
    bound, processors = sampling.bind(found.model, rows, lefts, tokenizer)
    if samples > 1 and bound.temperature == 0:
        raise ValueError(
            f"num_samples={samples} with greedy decoding gives equal texts; pass sampling=specdec.Sampling(temperature=1.0)."
        )
    spec = drafter.spec(bound)
    rule.check(spec)
    check_clock(spec, found.model)
    config = bound.generation_config
    eos, strings = (found.stop_tokens, None) if config is None else (config.eos_token_id, config.stop_strings)
    stop = as_stop_tokens(stop_tokens, eos, found.vocab)
    texts = [
        Text(i * samples + j, row.numpy(), len(row), left, first + i + j * _SAMPLE_KEYS, processors=own)
        for (i, j), row, left, own in zip(places, rows, lefts, processors, strict=True)
    ]
    return Request(
        target=found,
        drafter=drafter,
        rule=rule,
        engine=made_engine,
        sampling=bound,
        spec=spec,
        first_index=first,
        num_samples=samples,
        count=samples * len(given),
        texts=texts,
        written={},
        skipped={i * samples + j: reason for i, reason in unread.items() for j in range(samples)},
        slots=slots,
        stop_tokens=stop,
        stopping=StopStrings(tokenizer, strings) if strings else None,
        tokenizer=tokenizer,
        seed=seed,
        trace=trace,
        notes=(logprob, raw_logprob) if logprobs else (),
        last=last,
        keep=keep,
        coins=None,
        began=began,
    )


def as_slots(batch_size: Any, keep: bool, last: Runs | None) -> int | None:
    """Rows that pass from text to text; None if each text has a row of its own."""
    if batch_size is None:
        return None
    slots = as_int("batch_size", batch_size, 1, cure="None decodes all at once")
    if keep or last is not None:
        raise ValueError(
            f"batch_size={slots} with {'keep' if keep else 'resume'}: rows pass from text to text, so there are no caches "
            "to go on in; leave batch_size out for conversations."
        )
    return slots


def as_last(resume: Any) -> Runs | None:
    """The runs that the generation to be resumed has kept."""
    if resume is None:
        return None
    runs = getattr(resume, "runs", resume)
    if isinstance(runs, Runs):
        return runs
    if hasattr(resume, "runs"):
        raise ValueError(
            "resume is a generation that has kept nothing (or was read from a finished journal); generate it with keep=True."
        )
    raise wrong_kind("resume", resume, "pass the generation to go on from, which was made with keep=True")


def refuse_unknown(given: Mapping[str, Any]) -> None:
    """Raise ValueError if there are arguments that `generate` does not know, and say where each of them belongs."""
    if given:
        cures = "; ".join(f"{name}={brief(value)}: {_home(name, value)}" for name, value in given.items())
        raise ValueError(f"generate and stream have no such argument: {cures}{'' if cures.endswith('?') else '.'}")


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


_KNOWN = [*(name for name in signature(as_request).parameters if name != "unknown"), "journal", "progress"]
