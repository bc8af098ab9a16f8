"""Laws that are hard for floating point, for the certificate of batched code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from specdec.laws import Law
from specdec.sampling import Sampling
from specdec.testing.fast_paths import Nodes

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LEAST = 2.0**-149  # the smallest float32 above 0
SAMPLINGS = (
    Sampling(1.0), Sampling(0.05), Sampling(0.7), Sampling(1.0, top_k=1), Sampling(0.7, top_k=2), Sampling(0.7, top_p=0.6),
    Sampling(0.7, min_p=0.3),
)  # fmt: skip
SHAPES = (  # vocabulary, law, width
    *((vocab, Law.POINT, 2) for vocab in (3, 8)),
    *((vocab, law, 1) for vocab in (3, 50) for law in (Law.IID, Law.POINT)),
    *((vocab, law, 2) for vocab in (3, 8) for law in (Law.IID, Law.WITHOUT_REPLACEMENT)),
    *((vocab, Law.IID, width) for vocab, width in ((5, 3), (3, 5))),
    *((5, Law.WITHOUT_REPLACEMENT, width) for width in (3, 5)),
    *((vocab, Law.SAMPLED_THEN_TOP, width) for vocab, width in ((3, 2), (50, 2), (8, 4))),
)


def _random(vocab: int, seed: int) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _peaked(vocab: int, gap: float, at: int) -> Tensor:
    """[vocab] logits: one token is `gap` above the largest of the others, which differ a little."""
    logits = _random(vocab, 3) * 0.3
    logits[at] = logits.max() + gap
    return logits


def _cases(vocab: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, target's logits [vocab], draft's logits [vocab]), divided by the temperature already."""
    flat, one, other = torch.zeros(vocab, dtype=torch.float64), _random(vocab, 1), _random(vocab, 2)
    half = torch.arange(vocab) < vocab // 2
    stairs, near = -30.0 * torch.arange(vocab), 1e-17 * torch.arange(vocab, dtype=torch.float64)
    near[0] = 0.5  # so large that the others' differences are below its rounding
    yield "two random laws", one, other
    yield "target and draft agree", one, one
    yield "target and draft nearly agree", one, one + 1e-4 * other
    yield "target and draft exclude each other", one.masked_fill(half, -torch.inf), other.masked_fill(~half, -torch.inf)
    yield "ties everywhere", flat, flat
    yield "ties in the draft", one, flat
    yield "half of the target's tokens impossible", one.masked_fill(half, -torch.inf), other
    yield "half of the draft's tokens impossible", one, other.masked_fill(half, -torch.inf)
    yield "one token left to draw", one, torch.full_like(flat, -torch.inf).index_fill(0, torch.tensor(1), 0.0)
    for gap in (20, 60, 88, 90, 95, 103, 200):
        yield f"draft's gap {gap}", 0.03 * one, _peaked(vocab, gap, 0)
        yield f"target's gap {gap}", _peaked(vocab, gap, 1), 0.3 * other
    yield "the same peak, gaps 30 and 95", _peaked(vocab, 30, 1), _peaked(vocab, 95, 1)
    yield "peaks apart, gaps 95 and 95", _peaked(vocab, 95, 0), _peaked(vocab, 95, 1)
    yield "draft falls in steps of 30", 0.3 * one, stairs
    yield "both fall in steps of 30", stairs.flip(0), stairs
    yield "logits around 1000", 1000 + one, 1000 + other
    yield "near ties below the peak", near, other


AS_DRAWN, IN_BFLOAT16 = "as they are drawn", "bfloat16, not normalised"
UNDERFLOW = "all but the largest the least number there is"
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    AS_DRAWN: lambda probs: probs,
    IN_BFLOAT16: lambda probs: (129 * probs).bfloat16(),
    "float16, not normalised": lambda probs: (129 * probs).half(),
    "float64, cubed": lambda probs: probs.double() ** 3,
    UNDERFLOW: lambda probs: torch.where(probs == probs.amax(-1, keepdim=True), probs, LEAST * (probs > 0)),
}


def hard_nodes(
    vocab: int, law: Law, width: int, sampling: Sampling, dtype: torch.dtype, weights: str = AS_DRAWN
) -> Nodes:
    """All cases of a shape, decided together."""
    names, target, draft = zip(*_cases(vocab), strict=True)
    logits, drafted = ((torch.stack(part) * sampling.temperature).to(dtype) for part in (target, draft))
    return Nodes(names, logits, WEIGHTS[weights](sampling.probabilities(drafted)), law, width, sampling)
