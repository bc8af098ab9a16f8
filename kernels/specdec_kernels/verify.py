"""The op `specdec::verify`: sibling rejection of a batch of draft trees."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.reference import verify as reference


@torch.library.custom_op("specdec::verify", mutates_args=(), device_types="cuda")
def verify(
    logits: Tensor, tokens: Tensor, children: Tensor, laws: Tensor, draft_probs: Tensor | None,
    accept: Tensor, emit: Tensor, depth: int,
    temperature: float, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    lenience: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(path, accepted, token, invalid): see `specdec_kernels.reference.verify`."""
    from specdec_kernels.backend import on
    from specdec_kernels.triton import verify as kernel

    drafted = tokens, children, laws, draft_probs
    with on(logits):
        return kernel.verify(logits, *drafted, accept, emit, depth, temperature, top_k, top_p, min_p, lenience)


verify.register_kernel("cpu")(reference.verify)


@verify.register_fake
def _(logits, tokens, children, laws, draft_probs, accept, emit, depth, *args, **kwargs):
    batch = len(tokens)
    integers = [tokens.new_empty(shape) for shape in ((batch, depth + 1), (batch,), (batch,))]
    return *integers, tokens.new_empty(batch, dtype=torch.bool)
