"""The ways to decode many prompts that `experiments.studies.batching` compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

import specdec
from experiments.studies.batching_page import SLOTS, THEIRS, TODAY
from experiments.studies.batching_prompts import LAW
from specdec import Generation
from specdec.drafters import Drafter, ModelDrafter, NgramDrafter
from specdec.trees import Chain

PAGE = 256  # tokens of a page of transformers' cache


class Case(NamedTuple):
    """What is decoded in all ways."""

    batch: int
    prompts: int
    drafter: str

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {self.prompts} prompts, {self.drafter}"


class Job(NamedTuple):
    """A case of one round: prompts are [length] int64."""

    pair: Any
    prompts: list[Tensor]
    drafter: Drafter | None
    case: Case
    tokens: int
    seed: int


Way = Callable[[Job], tuple[list[list[int]], dict[str, Any]]]


def decoded(job: Job, prompts: Sequence[Tensor], **options: Any) -> Generation:
    return specdec.generate(
        job.pair.target, prompts, job.drafter, max_new_tokens=job.tokens, seed=job.seed, **LAW, **options
    )


def one_after_another(job: Job) -> tuple[list[list[int]], dict[str, Any]]:
    """Batches that each run until their last row has ended."""
    size = job.case.batch
    starts = range(0, len(job.prompts), size)
    return written([decoded(job, job.prompts[i : i + size], first_index=i) for i in starts])


def slots(job: Job) -> tuple[list[list[int]], dict[str, Any]]:
    """One call, whose rows are refilled."""
    return written([decoded(job, job.prompts, batch_size=job.case.batch)])


def written(made: list[Generation]) -> tuple[list[list[int]], dict[str, Any]]:
    """The texts; and how many steps they took, and which share of the rows was running in these."""
    steps = [step.emitted for out in made for step in out.trace.steps]
    running = sum(count > 0 for emitted in steps for count in emitted) / sum(map(len, steps))
    return [text.tolist() for out in made for text in out.tokens], {"steps": len(steps), "running": running}


def generate_batch(job: Job) -> tuple[list[list[int]], dict[str, Any]]:
    """transformers' continuous batching, with sdpa, in a cache that holds the requests at work with room to spare."""
    temperature, stop, batch = LAW["sampling"].temperature, list(LAW["stop_tokens"]), job.case.batch
    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, max_new_tokens=job.tokens, eos_token_id=stop, pad_token_id=0
    )
    pages = -(-(max(map(len, job.prompts)) + job.tokens) // PAGE)
    batching = ContinuousBatchingConfig(
        max_requests_per_batch=batch,
        num_blocks=(pages + 1) * batch,
        page_size=PAGE,
        max_batch_tokens=512,
        seed=job.seed,
    )
    ids = [prompt.tolist() for prompt in job.prompts]
    options = {"generation_config": config, "continuous_batching_config": batching, "warmup": False}
    done = job.pair.target.generate_batch(ids, **options).values()
    texts = [[int(token) for token in request.generated_tokens] for request in done]
    if len(texts) < len(ids) or not all(texts):
        raise RuntimeError(f"generate_batch gave {sum(map(bool, texts))} texts for {len(ids)} prompts.")
    return texts, {}


def ways(case: Case) -> dict[str, Way]:
    """What is compared; the first is the baseline."""
    ours: dict[str, Way] = {TODAY: one_after_another, SLOTS: slots}
    return ours | ({THEIRS: generate_batch} if case.drafter == "none" else {})


def drafters(pair: Any) -> dict[str, Drafter | None]:
    return {"none": None, "chain of 2": ModelDrafter(pair.draft, Chain(2)), "n-gram": NgramDrafter(length=4)}
