"""Temperature, top-k, top-p and min-p without a sort: which tokens are kept is one threshold on the logits of a row.

All four keep the most probable tokens, so that the law of a row is three numbers:
p(x) = exp((logit(x) - peak) / temperature) / total where logit(x) >= cut, and 0 elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specdec_kernels.reference.early_exit import all_false_cheaply


def probabilities(
    logits: Tensor,  # [row, vocab]
    temperature: float,  # 0: certain of the first of the largest logits
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The law [row, vocab], at least float32. The filters apply in the order of the arguments; all ties are kept.

    Filters cut by the logits as they are: the law of two tokens may round to the same where their logits differ.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1)
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], -torch.inf)
    probs, peak = _softmax(scores, temperature)
    if top_p is not None and top_p < 1:
        probs = _renormalised(probs, _in_nucleus(scores, probs, top_p))
    if min_p:
        probs = _renormalised(probs, scores >= peak.double() + temperature * math.log(min_p))
    return probs


def _softmax(scores: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The law [row, vocab], and the largest scores [row, 1]."""
    peak = scores.amax(-1, keepdim=True)
    if temperature != 1:  # from the peak down: of a large logit the quotient would lose digits
        scores = (scores - peak).div_(temperature)
    return scores.softmax(-1), peak


def law(
    logits: Tensor,  # [row, vocab]
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The law of every row as numbers.

    Returns:
        (peak, cut, total) [row, 3] float64, total NaN where there is no law (a NaN or +inf, or all logits -inf);
        the first most probable token [row] int64, which is the whole law at temperature 0: there cut is the peak, and
        total is 1.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    peak, best = scores.max(-1, keepdim=True)
    if temperature == 0:
        cut, total = peak, torch.ones_like(peak, dtype=torch.float64)
    else:
        kept = probabilities(logits, temperature, top_k, top_p, min_p) > 0
        cut = scores.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        weights = ((scores - peak) / temperature).exp().where(scores >= cut, 0)
        total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    total = total.masked_fill(~peak.isfinite(), torch.nan)
    return torch.cat([peak.double(), cut.double(), total], -1), best[:, 0]


def _renormalised(probs: Tensor, kept: Tensor) -> Tensor:
    """`probs`, changed in place."""
    probs *= kept
    return probs.div_(probs.sum(-1, keepdim=True))


def _in_nucleus(scores: Tensor, probs: Tensor, top_p: float) -> Tensor:
    """[row, vocab] bool: the smallest sets of largest `scores` [row, vocab] with a mass of `probs` [row, vocab] >= top_p."""
    rounded = probs.float()
    least = _nucleus_threshold(rounded, top_p)
    kept, last = rounded >= least, rounded == least
    ranked = scores.masked_fill(~last, -torch.inf)
    if all_false_cheaply((last & (scores < ranked.amax(-1, keepdim=True))).any(-1)):
        return kept
    # several scores have the least probability that is kept: the smaller ones may have to go
    ranked, index = ranked.sort(dim=-1, descending=True)
    above = probs.masked_fill(rounded <= least, 0).sum(-1, keepdim=True, dtype=torch.float64)
    missing = above + probs.gather(-1, index).cumsum(-1, dtype=torch.float64) < top_p * (1 - 1e-9)
    count = last.sum(-1, keepdim=True)
    place = torch.minimum((missing & (ranked > -torch.inf)).sum(-1, keepdim=True), count - 1)
    return kept & (scores >= ranked.gather(-1, place))


def _nucleus_threshold(probs: Tensor, top_p: float) -> Tensor:
    """Least probability [row, 1] in the smallest set of largest `probs` [row, vocab] float32 with mass >= top_p.

    Without a sort: the bits of non-negative floats order as the floats do, so the threshold's upper half is found in a
    histogram of the mass by upper halves, and its lower half among those who share the upper one.
    """
    bits = probs.view(torch.int32)  # 30 of them in use: probabilities are at most 1
    half, buckets = 15, 1 << 15

    def mass(bucket: Tensor) -> Tensor:
        return probs.new_zeros(len(probs), buckets + 2).scatter_add_(1, bucket.long(), probs)

    def first_crossing(mass: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        """[row, 1]: the first bucket at which the mass from below exceeds 1 - top_p, and the mass below that bucket."""
        mass = mass.cumsum(-1, dtype=torch.float64) + below
        limit = (mass[:, -1:] * (1 - 1e-9)).clamp(max=1 - top_p)  # crossed in spite of rounding
        crossing = (mass > limit).int().argmax(-1, keepdim=True)
        return crossing, torch.where(crossing > 0, mass.gather(1, (crossing - 1).clamp(min=0)), below)

    upper, below = first_crossing(
        mass((bits >> half).clamp_(0, buckets)), probs.new_zeros(len(probs), 1, dtype=torch.float64)
    )
    start = upper.int() << half
    inside = (bits - start).clamp_(-1, buckets).add_(1)  # the first and the last bucket are all who do not share it
    lower, _ = first_crossing(mass(inside)[:, 1:-1], below)
    return (start + lower.int()).view(torch.float32)
