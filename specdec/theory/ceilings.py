"""How often the best verifier accepts a child of one node: optimal transport, exact for every draft law."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from specdec.checks import as_int, as_ints, brief
from specdec.laws import Law, as_law, excludes_elders, is_random

_STEP = 0.1  # step of the double exponential quadrature, whose error is below 1e-12
_DECAY = 40.0  # integrands are cut off where they fall below exp(-40) < 1e-17


def one_step_ceiling(
    p: ArrayLike, law: Law, q: ArrayLike | None = None, *, count: int = 1, top: Sequence[int] = ()
) -> float:
    """The largest probability with which a lossless verifier can accept one of the children of a node.

    A verifier couples the children with a token of law p, and accepts when that token is one of them. By max-flow =
    min-cut the best coupling does so with probability min over sets H of tokens of 1 + p(H) - Pr[all children in H]
    (optimal transport: Sun et al., arXiv:2310.15141; its dual: Hu et al., arXiv:2502.18779). H must hold the points `top`,
    or Pr is 0. With r the draft's law q outside of the points, the minimum over the rest of H has a closed form:

    - independent draws (IID, and SAMPLED_THEN_TOP with its one draw): Pr = r(H)^count is convex in r(H): against its tangent
      at the best H, a set {p < c r} is as good. So H may be sought among the prefixes of the tokens sorted by p / r:
      O(V log V). For one draw the minimum is p(top) + sum min(p, r): sibling rejection has this value.
    - WITHOUT_REPLACEMENT: prefixes too (see `_all_among_first`, which evaluates Pr for all of them in O(V count G) with
      some G = 200 points of quadrature: 0.1 to 0.2 s for 4,096 tokens).
    - POINT: p(top).

    Args:
        p: [vocab] the target's law at the node.
        law: how the children are drawn.
        q: [vocab] the draft's law at the node; not needed for POINT. Both are normalised here.
        count: number of children, for IID and WITHOUT_REPLACEMENT.
        top: tokens of the children that are not random: all of them for POINT, all but the first for SAMPLED_THEN_TOP.
    """
    p, law, count = normalised(p), as_law(law), as_int("count", count, 0)
    top = sorted(set(as_ints("top", top, 0, len(p) - 1, "tokens are indices of p")))
    known, draws = p[top].sum(), sum(is_random(law, slot) for slot in range(count + len(top)))
    if draws == 0:
        return float(known)
    if top and draws == count + len(top):
        raise ValueError(f"top={top}: no child is certain under law={law.name}; leave it out.")
    if q is None:
        raise ValueError(f"law={law.name}, q=None: give q, the law that the children are drawn from.")
    q = normalised(q)
    if len(q) != len(p):
        raise ValueError(f"q has {len(q)} weights and p {len(p)}: must be laws of one vocabulary.")
    q[top] = 0
    r, drawn = normalised(q), np.flatnonzero(q)
    order = drawn[np.argsort(p[drawn] / r[drawn], kind="stable")]
    inside = _all_among_first(r[order], draws) if excludes_elders(law) else np.cumsum(r[order]) ** draws
    return float(1 + min(0, known + np.min(np.cumsum(p[order]) - inside)))


def _all_among_first(q: np.ndarray, count: int) -> np.ndarray:
    """[n]: for every i, the probability that `count` draws from q [n] > 0, without replacement, are all among q[:i + 1].

    Let every token arrive at a time of its own, exponential with rate q: they arrive in the order of drawing without
    replacement. With r = 1 - q(H), the rate of those outside H, the first of whom comes at time t with density
    r exp(-r t), the draws are not all in H when fewer than `count` of H have come by then: the count of independent
    events, which is extended token by token. The integrand falls like exp(-t q_count) or faster, q_count being the
    `count`-th largest q: either H lacks one of the largest, and r >= q_count, or it has them all.

    Why prefixes by p / q suffice: let H be best, i in H, j outside. Let s be the time by which count - 1 others of H have
    come, u when count have, T when the first outsider other than j does. Then F(H) - F(H - i), that i is drawn and all are
    in H, needs s < T, i before u and T, j after both s and i. By the density of i's time t, over q_i it is
    exp(-q_i t - q_j max(s, t)) where t < min(u, T). F(H + j) - F(H), that j is drawn and all are in H + j, over
    q_j has for t > s the same density from the cases in which i comes later, and for t < s at least exp(-q_j t) >=
    exp(-q_j s), whether i comes before s or after. So (F(H + j) - F(H)) / q_j >= (F(H) - F(H - i)) / q_i; and H being
    best, p_j is at least the first numerator and p_i at most the second: p_j / q_j >= p_i / q_i, and where they are equal
    H + j is as good.
    """
    count = min(count, len(q))
    end = np.log(_DECAY / np.partition(q, -count)[-count])
    s = np.arange(-np.log(_DECAY), end + _STEP, _STEP)
    time = np.exp(s - np.exp(-s))
    weight = _STEP * time * (1 + np.exp(-s))
    outside = np.append(np.cumsum(q[:0:-1])[::-1], 0)
    come = np.zeros((count, len(time)))  # come[j]: the probability that exactly j of the prefix have come
    come[0], missed = 1, np.empty(len(q))
    for i, (rate, other) in enumerate(zip(q, outside, strict=True)):
        late = np.exp(-rate * time)
        come[1:] = come[1:] * late + come[:-1] * (1 - late)
        come[0] *= late
        missed[i] = other * (weight * np.exp(-other * time)) @ come.sum(0)
    return 1 - missed


def normalised(weights: ArrayLike) -> np.ndarray:
    """[vocab]: the law that has these weights."""
    try:
        law = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError):
        law = np.empty(0)  # what cannot be read as numbers is no law
    if not (law.ndim == 1 and (law >= 0).all() and 0 < law.sum() < np.inf):
        cure = "a law is a vector of finite non-negative weights [vocab], not all of them 0"
        raise ValueError(f"weights={brief(weights)}: {cure}.")
    return law / law.sum()
