"""What a run may note of every token that it emits, from logits that are there anyway.

Each function here notes one thing of the nodes of the accepted paths. Those of one run give tensors of one shape.

Args:
    scores: [batch, place, vocab], at least float32: the target's scores after the logits processors.
    logits: [batch, place, vocab]: its raw logits.
    tokens: [batch, place] int64: the tokens that follow.
    sampling: the sampling of the run.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from specdec.sampling import Sampling

Note = Callable[[Tensor, Tensor, Tensor, Sampling], Tensor]


def logprob(scores: Tensor, logits: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """[batch, place] float32: log-probabilities of the tokens under the target's law."""
    return sampling.probabilities(scores).gather(-1, tokens[..., None])[..., 0].log().float()


def raw_logprob(scores: Tensor, logits: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """[batch, place] float32: log-probabilities of the tokens under the softmax of the raw logits."""
    # at least float32
    wide = logits.to(scores.dtype)
    return (wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)).float()


def warped_scores(scores: Tensor, logits: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """[batch, place, vocab] float32: what transformers calls scores; see `Sampling.scores`."""
    return sampling.scores(scores).float()


def raw_logits(scores: Tensor, logits: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """[batch, place, vocab] float32: the raw logits."""
    return logits.float()
