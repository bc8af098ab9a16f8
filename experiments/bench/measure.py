"""Interleaved measurements: every round runs every method on every batch of prompts, so that drift hits all alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from experiments.peer_methods import baseline
from specdec import Generation, Sampling
from specdec.trace import Trace

AGAIN = "the first again"
_RECORDED = 16  # tokens: more than a few trees nobody looks at, and laws of large vocabularies are large
Method = Callable[..., Generation]  # specdec.generate, or anything that takes and returns the same, with its options


class Refused(SystemExit):
    """What the library says to a combination that it does not decode with, and the cure."""


@dataclass(frozen=True)
class Run:
    """One batch of prompts decoded by one method."""

    trace: Trace
    prompts: int
    identical: int | None  # how many texts are transformers' own; None when sampled


Round = dict[str, list[Run]]  # by method, one run per batch


def rounds(
    target: PreTrainedModel,
    methods: dict[str, Method],
    batches: list[list[Tensor]],
    *,
    repeats: int,
    sampling: Sampling,
    max_new_tokens: int,
    later: Sequence[bool] = (),
) -> Iterator[Round]:
    """Yields each round when it is complete; what a method cannot do, it says before the first.

    The first method runs again at the end of every batch, as `AGAIN`: by how much a method differs from itself is the noise
    floor of this machine. Greedy texts are compared with transformers', each prompt by itself.

    Args:
        later: of each batch, whether it holds the next turns of the conversations of the batch before. There a method that
            can resume does so, in the caches of its own last run.

    Raises:
        Refused: a method cannot decode these prompts.
    """
    options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": max_new_tokens}
    for name, method in methods.items():  # what is done once per model (probes, buffers) is not measured
        try:
            method(target, batches[0], **{**options, "max_new_tokens": min(8, max_new_tokens)})
        except ValueError as error:
            raise Refused(f"{name}: {error}") from error
    methods = {**methods, AGAIN: next(iter(methods.values()))}
    return _rounds(target, methods, batches, later or [False] * len(batches), repeats, options)


def _rounds(
    target: PreTrainedModel,
    methods: dict[str, Method],
    batches: list[list[Tensor]],
    later: Sequence[bool],
    repeats: int,
    options: dict[str, Any],
) -> Iterator[Round]:
    greedy = options["sampling"].temperature == 0
    texts = [[baseline.generate(target, [p], **options).tokens[0] for p in batch if greedy] for batch in batches]
    resuming = {name for name, method in methods.items() if any(later) and _takes(method, "resume")}
    going_on = [*later[1:], False]
    with tqdm(total=repeats * len(batches) * len(methods), desc="decoding", leave=False) as bar:
        for seed in range(repeats):
            done: Round = {name: [] for name in methods}
            last: dict[str, Any] = {}  # what each method has kept
            for batch, keep, expected in zip(batches, going_on, texts, strict=True):
                for name, method in methods.items():
                    more = {"resume": last.pop(name, None), "keep": keep} if name in resuming else {}
                    out = method(target, batch, **options, seed=seed, **more)
                    if more and keep:
                        last[name] = out
                    identical = sum(map(torch.equal, out.tokens, expected)) if greedy else None
                    done[name].append(Run(out.trace, len(batch), identical))
                    bar.update()
            yield done


def recorded(
    target: PreTrainedModel, methods: dict[str, Method], prompt: Tensor, *, sampling: Sampling, tokenizer: Any
) -> dict[str, Generation]:
    """The first steps of every method that can record its laws, for one prompt."""
    options: dict[str, Any] = {
        "sampling": sampling,
        "max_new_tokens": _RECORDED,
        "trace": "laws",
        "tokenizer": tokenizer,
    }
    return {name: method(target, [prompt], **options) for name, method in methods.items() if _takes(method, "trace")}


def _takes(method: Method, option: str) -> bool:
    return option in inspect.signature(method).parameters


def uninterrupted(complete: Iterable[Round]) -> list[Round]:
    """The rounds that were complete at the end or at Ctrl-C."""
    finished: list[Round] = []
    with suppress(KeyboardInterrupt):
        for done in complete:
            finished.append(done)
    if not finished:
        raise SystemExit("No round is complete, so there is nothing to show.")
    return finished


def against_ceilings(
    target: PreTrainedModel,
    methods: dict[str, Method],
    batches: list[list[Tensor]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
) -> dict[str, dict[str, Any]]:
    """`ceiling_share` and `divergence` of every method that can say them, from one more round, not timed: it takes long."""
    options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": max_new_tokens, "trace": "ceiling"}
    able = {name: method for name, method in methods.items() if _takes(method, "trace")}
    found = {}
    for name, method in tqdm(able.items(), desc="ceilings", leave=False):
        steps = [step for batch in batches for step in method(target, batch, **options).trace.steps]
        summary = Trace(steps=steps).summary()
        found[name] = {key: summary[key] for key in ("ceiling_share", "divergence") if key in summary}
    return found
