"""Losses that fit a draft model to a target, on text that the target wrote.

All take the same three tensors and return a scalar to minimise, in nats or in tokens per place:

    target_law: [batch, place, vocab]: the target's log-probabilities after each place of a text (fixed)
    draft_law: [batch, place, vocab]: the draft's log-probabilities, at the same temperature; they carry the gradient
    tokens: [batch, place] int64: the token that came next; negative where the target wrote none (prompt, padding)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.checks import as_int, check_flag

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(target_law: Tensor | None, draft_law: Tensor, tokens: Tensor) -> Tensor:
    """The cross-entropy of the tokens that the target wrote; its law is not used."""
    return -_mean(_at_tokens(draft_law, tokens), tokens)


def kl(target_law: Tensor, draft_law: Tensor, tokens: Tensor) -> Tensor:
    """Forward KL(target || draft), as in DistillSpec (arXiv:2310.08461)."""
    return _mean((target_law.exp() * (target_law - draft_law)).sum(-1), tokens)


def lk(target_law: Tensor, draft_law: Tensor, tokens: Tensor) -> Tensor:
    """-log sum min(p, q): the negative log of the rate at which a single draft is accepted."""
    return -_mean(overlap(target_law, draft_law).log(), tokens)


def tv(target_law: Tensor, draft_law: Tensor, tokens: Tensor) -> Tensor:
    """The total variation distance, 1 - sum min(p, q): the rate at which a single draft is rejected."""
    return 1 - _mean(overlap(target_law, draft_law), tokens)


def expected_tau(target_law: Tensor, draft_law: Tensor, tokens: Tensor, depth: int = 4, block: bool = False) -> Tensor:
    """The negative expected acceptance length of a chain, over all places where one can start.

    Args:
        depth: drafted tokens.
        block: whether chains are verified by block verification; otherwise by token-level rejection.
    """
    accepted = acceptance_by_depth(target_law, draft_law, tokens, depth, block)
    drafted = tokens[:, : accepted.shape[1]] >= 0
    return -1 - accepted.sum(-1)[drafted].mean()


def acceptance_by_depth(
    target_law: Tensor, draft_law: Tensor, tokens: Tensor, depth: int, block: bool = False
) -> Tensor:
    """[batch, start, depth]: at each start, unbiased estimates of the chance that 1, 2, ... drafted tokens are accepted.

    Let a text x be drafted, q_j and p_j be the two laws' probabilities of x_j after x_1 .. x_j-1, Q_i and P_i their
    products up to i. A lossless verifier of chains accepts i tokens with probability E_{x ~ Q} reach_i(x), where
    reach_0 = 1 and

    - token-level rejection has reach_i = reach_i-1 min(1, p_i / q_i): every token must be accepted by itself;
    - block verification has reach_i = min(1, reach_i-1 p_i / q_i) (`specdec.theory.chain_optimum`).

    The given text was drawn from P, not Q: E_{x ~ Q} reach_i = E_{x ~ P} w_i with w_i = reach_i Q_i / P_i (where P_i = 0,
    reach_i is 0 too). Multiply the recursions by R_i = Q_i / P_i, and they become

    - token level: w_i = w_i-1 min(1, q_i / p_i);
    - block: w_i = min(R_i, w_i-1), the least likelihood ratio on the way, R_0 = 1 included.

    Both are w_i = min(r_i-1 q_i / p_i, w_i-1), with r = w at token level and r = R for blocks. Given x_1 .. x_i-1 the
    expectation over x_i ~ p_i needs no sample: it is the sum over x of min(r_i-1 q_i(x), w_i-1 p_i(x)), which is returned.
    (It is not the product of the overlaps sum min(p, q) along a text of the target: accepted tokens are distributed as
    min(p, q), normalised, not as p.) As P does not depend on the draft, the gradient of this estimate is an unbiased
    estimate of the gradient.

    A chain accepts nothing after the end of its text (tokens < 0), and nothing after a token of probability 0 under the
    target's law. A target that reads its own text finds such tokens by rounding, where its laws have zeros.
    """
    depth = as_int("depth", depth, 1)
    check_flag("block", block)
    starts = tokens.shape[1] - depth + 1
    if starts < 1:
        raise ValueError(f"Texts of {tokens.shape[1]} places have no room for a chain of {depth}; use longer ones.")
    written = _at_tokens(target_law, tokens)
    log_ratio = torch.where(written == -torch.inf, written, _at_tokens(draft_law, tokens) - written)
    weight = ratio = torch.zeros_like(log_ratio[:, :starts])  # [batch, start]: log w, log r
    overlaps = overlap(target_law, draft_law)
    chances = []
    for d in range(depth):
        here = slice(d, d + starts)
        if block and d > 0:
            chance = overlap(weight[..., None] + target_law[:, here], ratio[..., None] + draft_law[:, here])
        else:  # r = w: one pass over the vocabulary serves all depths
            chance = weight.exp() * overlaps[:, here]
        chances.append(chance * (tokens[:, here] >= 0))
        ratio = ratio + log_ratio[:, here]
        weight = torch.minimum(ratio, weight)
        if not block:
            ratio = weight
    return torch.stack(chances, -1)


def overlap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[...]: sum min(p, q) over the vocabulary, for logarithms [..., vocab]; of laws it is the rate 1 - TV of acceptance."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def _at_tokens(law: Tensor, tokens: Tensor) -> Tensor:
    """[batch, place]: the log-probability of each token; arbitrary where there is none."""
    return law.gather(2, tokens.clamp(min=0)[..., None])[..., 0]


def _mean(values: Tensor, tokens: Tensor) -> Tensor:
    """The mean of `values` [batch, place] over the places where the target wrote a token."""
    return values[tokens >= 0].mean()
