"""What reading prompts costs while texts are decoded: beginnings that many share, and one newcomer that is long.

Parts of `experiments.studies.batching`. Ways in which the library does not work are patched in here, to compare with.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import specdec
from specdec import Sampling, slots
from specdec.drafters import ModelDrafter
from specdec.models import cached_model
from specdec.models.cache import Source, TreeCache
from specdec.models.cached_model import CachedModel
from specdec.models.held_texts import Entry, Held
from specdec.trees import Chain

COMMON, OWN, BATCH = 303, 60, 16  # tokens of the shared beginning, of each prompt after it; rows
OTHERS = 12  # texts that enter before the long one
# The stop tokens: the end of a text, and one, two or more empty lines.
LAW: dict[str, Any] = {"sampling": Sampling(temperature=0.8), "stop_tokens": (0, 199, 320, 469)}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the tokens that models read and copy when texts enter rows."""
    found, enter = {"read": 0, "copied": 0}, CachedModel.enter

    def counting(run: CachedModel, *arguments: Any) -> None:
        before = run.tokens_read, run.tokens_copied
        enter(run, *arguments)
        found["read"] += run.tokens_read - before[0]
        found["copied"] += run.tokens_copied - before[1]

    with mock.patch.object(CachedModel, "enter", counting):
        yield found


def unshared() -> AbstractContextManager[Any]:
    """Texts that enter rows read all of themselves; those that move to a smaller batch are copied as ever."""
    found = cached_model.next_readings

    def alone(cache: TreeCache, entries: Mapping[int, Entry], held: Iterable[Held]) -> Any:
        held = [*held]
        if any(one.source.cache is not cache for one in held):
            return found(cache, entries, held)
        return {row: Source(cache, row, 0) for row in entries}, {row: entry.goal for row, entry in entries.items()}

    return mock.patch.object(cached_model, "next_readings", alone)


def shared(asked: argparse.Namespace) -> dict[str, Any]:
    """Prompts with one beginning: each reads it, or it is copied."""
    pair = specdec.demo.load()
    ids = [torch.tensor(pair.tokenizer(prompt.text)["input_ids"]) for prompt in pair.prompts]
    beginning = torch.cat(ids[-3:])[:COMMON]
    prompts = [torch.cat([beginning, own[:OWN]]) for own in ids[: asked.prompts]]
    budgets = np.random.default_rng(0).integers(8, 65, len(prompts)).tolist()
    drafter, law = ModelDrafter(pair.draft, Chain(2)), {**LAW, "stop_tokens": (), "seed": 5}
    found, texts = {}, []
    for name, way in {"read by each": unshared, "copied": nullcontext}.items():
        with way(), counted() as tokens:
            began = time.process_time()
            out = specdec.generate(pair.target, prompts, drafter, batch_size=BATCH, max_new_tokens=budgets, **law)
            process = time.process_time() - began
        made = sum(map(len, out.tokens))
        found[name] = {**tokens, "process": process, "prefill": out.trace.prefill_seconds, "tokens": made}
        texts.append([text.tolist() for text in out.tokens])
    sizes = f"{len(beginning)} common tokens and up to {OWN} own, 8 to 64 new ones"
    about = f"{len(prompts)} prompts of {sizes}, batch {BATCH}, chain of 2; tokens of both models are counted."
    same = sum(a == b for a, b in zip(*texts, strict=True))
    return {"about": about, "prompts": len(prompts), "same": same, "ways": found}


def gaps(asked: argparse.Namespace) -> dict[str, Any]:
    """The longest time between two steps of texts at work, while one long prompt enters."""
    pair = specdec.demo.load()
    pair.target.config.max_position_embeddings = (
        4 * asked.newcomer
    )  # so far on texts mean nothing, but cost what they cost
    ids = [torch.tensor(pair.tokenizer(prompt.text)["input_ids"]) for prompt in pair.prompts[:OTHERS]]
    long = torch.cat(ids * (1 + asked.newcomer // sum(map(len, ids))))[: asked.newcomer]
    ways = {
        f"{slots._CHUNK} tokens between two steps": nullcontext,
        "at once": lambda: mock.patch.object(slots, "_CHUNK", asked.newcomer),
    }
    found = {name: _gaps(pair.target, [*ids, long], way) for name, way in ways.items()}
    about = (
        f"One prompt of {asked.newcomer} tokens enters a batch of 8 in which others are decoded, without a draft. A gap is "
        "the wall time from the end of one step to the end of the next."
    )
    return {"about": about, "ways": found}


def _gaps(target: Any, prompts: list[Tensor], way: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
    # Texts that may get as long as the newcomer are decoded in the same rows. Those that may get fewest tokens enter last.
    budgets = [*[len(prompts[-1])] * (len(prompts) - 1), 1]
    with way():
        stream = specdec.stream(target, prompts, batch_size=8, max_new_tokens=budgets, seed=5, **LAW)
        next(index for index, _ in stream if index == len(prompts) - 1)  # until the newcomer has got a token
        stream.close()
    steps = stream.generation.trace.steps
    seconds = [step.seconds for step in steps]
    reading = sum(-1 in step.held for step in steps)
    return {"steps": len(steps), "median": float(np.median(seconds)), "longest": max(seconds), "reading": reading}


STUDIES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"shared": shared, "gaps": gaps}
