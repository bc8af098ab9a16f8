"""Texts written by the target, which its drafters should learn to predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_int, as_seed
from specdec.generate import generate
from specdec.sampling import Sampling


def continuations(
    target: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int = 192,
    sampling: Sampling = Sampling(temperature=1.0),
    batch: int = 64,
    seed: int = 0,
) -> Iterator[list[Tensor]]:
    """Prompts with the target's continuations, one batch at a time.

    Args:
        target: the target.
        prompts: 1-D int64 tensors, preferably of one length, so that no row holds up its batch.
        new_tokens: most new tokens per prompt; texts end at the target's EOS.
        sampling: the sampling that the drafter will be used with.
        batch: prompts decoded together.
    """
    batch, seed = as_int("batch", batch, 1), as_seed(seed)
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        new = generate(target, part, sampling=sampling, max_new_tokens=new_tokens, seed=seed + start).tokens
        yield [torch.cat(pair) for pair in zip(part, new, strict=True)]
