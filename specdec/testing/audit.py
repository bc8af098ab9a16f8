"""A statistical audit of any generator: are these tokens drawn from the target's law? Only samples are needed.

Certificates enumerate, and so need a small vocabulary; the audit takes real models, and any black box.

If every token is drawn from its law p, its randomised rank U = P(ranked above it) + v P(ranked with it), v uniform, is uniform
and independent of the past, whatever the order of tokens. Faults of speculative decoding show in three orders: by probability
(temperature, lenience), by the ratio of draft to target (missing residuals, wrong draft laws) and by token id, the order in
which tokens are drawn (reused noise). Bets are made on each order: wealth is multiplied by 1 + stake * g(U), where g has mean
0. Without a fault, the mean wealth of all bets is a martingale that starts at 1. Whenever one stops, it has exceeded 1 / alpha
with probability at most alpha (Ville's inequality; Shafer, Testing by betting, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_float, as_int, check_callable, check_kind
from specdec.processors import Processors
from specdec.sampling import Sampling

LogProbs = Callable[[Tensor, Tensor], Tensor]  # (prompt, continuation) -> [len(continuation), vocab]
# What a bet is on: tokens come more from one end of an order; from both ends; or rank like the token before.
SHAPES = ("shift", "spread", "serial")
_NOISE = 7919  # makes the audit's stream of random numbers differ from the generator's, whose seed is the same
STAKES = tuple(sign * size for size in (0.04, 0.1, 0.25, 0.6) for sign in (1, -1))


@dataclass(frozen=True)
class Audit:
    """What the audit found.

    Args:
        passed: whether evidence < log(1 / alpha).
        evidence: the largest natural logarithm of the mean wealth.
        tokens: how many tokens were examined.
        alpha: the largest probability that a generator without bias fails.
        detectable: the least bias (total variation per token) that so many tokens show with probability 0.9.
        leading: the order and shape of the bet that won most.
        impossible: how many tokens have probability 0 under the target's law.
    """

    passed: bool
    evidence: float
    tokens: int
    alpha: float
    detectable: float
    leading: str
    impossible: int

    def __str__(self) -> str:
        verdict = "passed" if self.passed else f"FAILED ({self.leading})"
        return (
            f"{verdict}: evidence {self.evidence:.1f} of {math.log(1 / self.alpha):.1f} in {self.tokens} tokens, which show a "
            f"bias of {self.detectable:.3f} per token with probability 0.9; {self.impossible} impossible tokens"
        )


def audit(
    generate: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    log_probs: LogProbs,
    *,
    draft_log_probs: LogProbs | None = None,
    max_tokens: int = 20_000,
    alpha: float = 0.01,
    seed: int = 0,
) -> Audit:
    """Draw texts until they are shown to be biased, or until there are `max_tokens` tokens without such evidence.

    >>> log_probs = model_log_probs(target, sampling)
    >>> def generate(seed):
    ...     out = specdec.generate(target, prompts, drafter, sampling=sampling, seed=seed)
    ...     return zip(prompts, out.tokens)
    >>> print(audit(generate, log_probs, draft_log_probs=model_log_probs(draft, sampling)))

    Args:
        generate: seed -> (prompt, continuation) pairs of 1-D int64 token ids, independent between pairs and seeds. It is
            called with seed, seed + 1, ...; batches are fastest.
        log_probs: (prompt, continuation) -> [len(continuation), vocab], the target's log-probabilities before each token,
            after temperature, top-k and whatever else the generator claims to apply.
        draft_log_probs: the same for the draft model, or for any model that a bias may lean to. Optional; most biases of
            speculative decoding show several times sooner with it.
        max_tokens: the number of tokens after which the audit stops.
        alpha: false-alarm rate, whenever the audit stops.
        seed: the seed of the generator's first call, and of the randomised ranks.

    `detectable` is for a bias that moves probability from one half of an order to the other. A bias that is spread over many
    directions needs more tokens, and one that none of the orders sees may not show at all.
    """
    alpha, max_tokens = as_float("alpha", alpha, "(0, 1)"), as_int("max_tokens", max_tokens, 1)
    seed = as_int("seed", seed, 0, 2**63 - 1)
    check_callable("generate", generate, "pass a function from a seed to (prompt, continuation) pairs")
    for name, law in (("log_probs", log_probs), ("draft_log_probs", draft_log_probs or log_probs)):
        check_callable(name, law, "pass a function of (prompt, continuation), such as model_log_probs(model, sampling)")
    orders = ("probability", "token id", *(["draft"] if draft_log_probs else []))
    bets = _Bets(orders, alpha)
    noise = np.random.default_rng([seed, _NOISE])
    for prompt, text in _texts(generate, seed):
        tokens = text[: max_tokens - bets.tokens].cpu()
        target, draft = log_probs(prompt, tokens), draft_log_probs and draft_log_probs(prompt, tokens)
        if not isinstance(target, Tensor):
            raise ValueError(f"log_probs returned a {type(target).__name__}, not a tensor [len(continuation), vocab].")
        if target.dim() != 2 or len(target) != len(tokens):
            raise ValueError(
                f"log_probs returned {list(target.shape)}, not [len(continuation) = {len(tokens)}, vocab]."
            )
        bets.impossible += int((target.gather(1, tokens[:, None]) == -torch.inf).sum())
        bets.take(_ranks(target, draft, tokens, torch.from_numpy(noise.random(len(tokens)))))
        if bets.best >= bets.limit or bets.tokens >= max_tokens:
            break
    return bets.report()


def model_log_probs(model: PreTrainedModel, sampling: Sampling) -> LogProbs:
    """`log_probs` of a transformers model under `sampling`, in one plain forward pass per text."""

    check_kind("model", model, PreTrainedModel, "pass a transformers model")
    check_kind("sampling", sampling, Sampling)

    def log_probs(prompt: Tensor, continuation: Tensor) -> Tensor:
        text = torch.cat([prompt, continuation])
        with torch.inference_mode():
            logits = model(input_ids=text[None].to(model.device), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1].cpu().clone()  # a clone can be written to outside of inference mode
        processors = Processors(sampling.processors)
        for i in range(len(continuation) if processors else 0):
            scores, processors = processors(text[: len(prompt) + i], logits[i : i + 1], last=True)
            logits[i] = scores[0]
        return sampling.probabilities(logits).log()

    return log_probs


def detectable(tokens: int, alpha: float, bets: int, power: float = 0.9) -> float:
    """Least total variation per token that `tokens` tokens show with probability `power`.

    The bias moves probability from one half of an order to the other: the density of U is 1 + 2 tv in one and 1 - 2 tv in the
    other. The logarithm of the best bet's wealth is then about normal, and its share of the mean wealth is 1 / `bets`.
    """
    due, margin = math.log(bets / alpha), math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * power - 1)))
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def shown(tv: float) -> bool:
        weight = (1 + 2 * tv * (0.5 - u).sign()) / len(u)
        for stake in STAKES[::2]:
            gain = torch.log1p(stake * _shift(u))
            mean = float((weight * gain).sum())
            spread = math.sqrt(tokens * (float((weight * gain**2).sum()) - mean**2))
            if tokens * mean - margin * spread >= due:
                return True
        return False

    low, high = 0.0, 0.5
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


class _Bets:
    """The wealth of every bet: [order, shape, stake]."""

    def __init__(self, orders: tuple[str, ...], alpha: float):
        self.orders, self.alpha, self.limit = orders, alpha, math.log(1 / alpha)
        self.stakes = torch.tensor(STAKES, dtype=torch.float64)
        self.wealth = torch.zeros(len(orders), len(SHAPES), len(STAKES), dtype=torch.float64)  # logarithms
        self.best, self.tokens, self.impossible = 0.0, 0, 0

    def take(self, ranks: Tensor) -> None:
        """Bet on one text, token after token. ranks: [order, token]."""
        shift = _shift(ranks)
        before = torch.nn.functional.pad(shift, (1, 0))[:, :-1]  # 0, so no bet, before the first token
        values = torch.stack([shift, torch.cos(2 * math.pi * ranks), shift * before])  # [shape, order, token]
        gains = torch.log1p(values[..., None] * self.stakes).permute(2, 1, 0, 3)  # [token, order, shape, stake]
        course = self.wealth + gains.cumsum(0)
        mean = course.flatten(1).logsumexp(1) - math.log(self.wealth.numel())
        over = (mean >= self.limit).nonzero()
        used = int(over[0]) + 1 if len(over) else len(mean)
        self.tokens += used
        if used:
            self.wealth, self.best = course[used - 1], max(self.best, float(mean[:used].max()))

    def report(self) -> Audit:
        order, shape, _ = next(
            c for c in product(*map(range, self.wealth.shape)) if self.wealth[c] == self.wealth.max()
        )
        least = detectable(self.tokens, self.alpha, self.wealth.numel())
        leading = f"{SHAPES[shape]} in the order by {self.orders[order]}"
        passed = self.best < self.limit
        return Audit(passed, self.best, self.tokens, self.alpha, least, leading, self.impossible)


def _shift(ranks: Tensor) -> Tensor:
    return torch.cos(math.pi * ranks)


def _texts(generate: Callable[[int], Iterable[tuple[Tensor, Tensor]]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The texts of `generate(seed)`, `generate(seed + 1)`, ... without those that have no tokens."""
    while True:
        drawn = [(prompt, tokens) for prompt, tokens in generate(seed) if len(tokens)]
        if not drawn:
            raise ValueError(f"generate({seed}) returned no tokens; an audit needs some.")
        yield from drawn
        seed += 1


def _ranks(target: Tensor, draft: Tensor | None, tokens: Tensor, noise: Tensor) -> Tensor:
    """The randomised rank of every token in every order: [order, token] float64 in [0, 1]."""
    index = torch.arange(target.shape[1]).expand_as(target)
    orders = [target, -index] if draft is None else [target, -index, draft - target]
    probs, ranks = target.double().exp(), []
    for scores in orders:
        own = scores.gather(1, tokens[:, None])
        above, tied = (probs * (scores > own)).sum(1), (probs * (scores == own)).sum(1)
        ranks.append((above + noise * tied).clamp(0, 1))
    return torch.stack(ranks)
