"""The most probable continuations of each node, with their log-probabilities."""

from __future__ import annotations

from torch import Tensor


def topk(
    logits: Tensor,  # [row, vocab]
    k: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [row, k], at least float32, and tokens [row, k] int64; among equals the smaller token first."""
    scores = (logits if logits.dtype.itemsize == 8 else logits.float()) / temperature
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    return scores.log_softmax(-1).gather(1, best), best
