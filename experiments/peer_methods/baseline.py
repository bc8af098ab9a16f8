"""transformers' own decoding, plain, assisted and with prompt lookup, called and measured like `specdec.generate`.

Steps are timed by a stopping criterion, which transformers calls after each forward pass of the target. As in specdec,
decoding time excludes the prefill; here that is all up to the first new tokens, so they are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from specdec import Generation
from specdec.clock import finish
from specdec.sampling import Sampling
from specdec.trace import Step, Trace


def generate(
    target: PreTrainedModel,
    prompts: list[Tensor],
    *,
    assistant: PreTrainedModel | None = None,
    draft_length: int = 4,
    prompt_lookup: int | None = None,
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 128,
    seed: int = 0,
) -> Generation:
    """`target.generate`; with an assistant, transformers' speculative decoding with `draft_length` tokens every step; or its
    drafts of up to `prompt_lookup` tokens from the text itself, of which it does not say how many there were.
    """
    if (assistant is not None or prompt_lookup is not None) and len(prompts) > 1:
        raise SystemExit(f"{len(prompts)} prompts: transformers' assisted generation takes one at a time; set batch=1.")
    longest = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])  # [batch, longest]
    mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts]).long()
    ends = target.generation_config.eos_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=0, **_law(sampling))
    generate: Any = target.generate  # its type stub is too narrow
    with torch.random.fork_rng(), _configured(target, config), _configured(assistant, _constant(draft_length)):
        torch.manual_seed(seed)
        clock = _Clock(longest)
        out = generate(
            padded.to(target.device),
            attention_mask=mask.to(target.device),
            assistant_model=assistant,
            prompt_lookup_num_tokens=prompt_lookup,
            stopping_criteria=StoppingCriteriaList([clock]),
            logits_processor=LogitsProcessorList(sampling.processors),
        )
    tokens = [_cut(row[longest:].cpu(), ends) for row in out]
    trace = clock.steps.trace(list(map(len, tokens)), max_new_tokens, draft_length if assistant is not None else 0)
    return Generation(tokens, None, trace)


class StepTimes:
    """When each step ended, and how long the new text was then; the first step is the prefill."""

    def __init__(self) -> None:
        self.times, self.lengths = [time.perf_counter()], [0]

    def note(self, length: int) -> None:
        """A step ends now, and there are so many new tokens."""
        self.times.append(time.perf_counter())
        self.lengths.append(length)

    def trace(self, totals: list[int], budget: int, draft_length: int = 0) -> Trace:
        """The steps after the first; what a step spent where is not known, so all of it counts as verification."""
        trace = Trace(prefill_seconds=self.times[1] - self.times[0])
        for i in range(2, len(self.times)):
            start, stop = self.lengths[i - 1 : i + 1]
            emitted = [max(min(stop, n) - start, 0) for n in totals]
            drafted = min(draft_length, budget - start - 1)
            accepted = [min(max(n - 1, 0), drafted) for n in emitted]
            tried = [min(n, drafted) for n in emitted]
            counts = [*range(len(totals))], emitted, accepted, tried
            trace.steps.append(Step(1 + drafted, *counts, 0.0, 0.0, self.times[i] - self.times[i - 1], 0.0))
        return trace


class _Clock(StoppingCriteria):
    """Stops nothing; notes the steps."""

    def __init__(self, start: int):
        self.steps, self._start = StepTimes(), start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        finish(input_ids.device)  # transformers waits for it a little later, in every step
        self.steps.note(input_ids.shape[1] - self._start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _configured(model: PreTrainedModel | None, config: GenerationConfig) -> Iterator[None]:
    """The model with this generation config instead of its own, whose every setting would be a default of this one."""
    if model is None:
        yield
        return
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _constant(draft_length: int) -> GenerationConfig:
    """By itself transformers adapts the number of drafted tokens, and stops drafting when the draft is unsure."""
    return GenerationConfig(
        num_assistant_tokens=draft_length, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0
    )


def _law(sampling: Sampling) -> dict[str, Any]:
    if sampling.generation_config is not None:
        raise ValueError("Sampling.from_generation_config is not supported by this baseline; give the fields by hand.")
    if sampling.temperature == 0:
        return {"do_sample": False}
    kept = {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0, "min_p": sampling.min_p}
    return {"do_sample": True, "temperature": sampling.temperature, **kept}


def _cut(tokens: Tensor, ends: int | list[int] | None) -> Tensor:
    """The tokens up to and including the first that ends a text."""
    stop = torch.isin(tokens, torch.tensor([] if ends is None else ends, dtype=torch.int64)).nonzero()
    return tokens[: int(stop[0]) + 1] if len(stop) else tokens
