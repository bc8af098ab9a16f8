"""Texts written by the target, which its drafters should learn to predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_int, as_seed
from specdec.generate import generate
from specdec.sampling import Sampling

_BATCHES = 4  # so that few rows are idle at the end


def continuations(
    target: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int = 192,
    sampling: Sampling = Sampling(temperature=1.0),
    batch: int = 64,
    seed: int = 0,
    first_index: int = 0,
) -> Iterator[list[Tensor]]:
    """Prompts with the target's continuations, some at a time.

    Args:
        target: the target.
        prompts: 1-D int64 tensors.
        new_tokens: most new tokens per prompt; texts end at the target's EOS.
        sampling: the sampling that the drafter will be used with.
        batch: texts at work at once. When one has ended, the next begins; `_BATCHES` times as many come together.
        seed, first_index: as for `generate`: a text depends on them, its place and its prompt.
    """
    batch, seed = as_int("batch", batch, 1), as_seed(seed)
    for start in range(0, len(prompts), _BATCHES * batch):
        part = list(prompts[start : start + _BATCHES * batch])
        options: dict[str, Any] = {
            "seed": seed,
            "first_index": first_index + start,
            "batch_size": min(batch, len(part)),
        }
        new = generate(target, part, sampling=sampling, max_new_tokens=new_tokens, **options).tokens
        yield [torch.cat(pair) for pair in zip(part, new, strict=True)]
