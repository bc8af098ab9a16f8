"""Text of the target's own making: what its drafters should learn to predict."""

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
    """Prompts with what the target makes of them, one batch at a time.

    Args:
        prompts: 1-D int64 tensors, best of one length, so that a batch is not held up by its longest row.
        new_tokens: most tokens per prompt; texts end at the target's EOS.
        sampling: as the drafter will meet it; a temperature of 1 shows it the most different texts.
        batch: prompts decoded together.
    """
    batch, seed = as_int("batch", batch, 1), as_seed(seed)
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        new = generate(target, part, sampling=sampling, max_new_tokens=new_tokens, seed=seed + start).tokens
        yield [torch.cat(pair) for pair in zip(part, new, strict=True)]
