"""How far a rule that is not lossless departs from the target's law, node by node."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.laws import Law, child_weights, excludes_elders, normalised
from specdec.rules.base import Rule

_DRAWS = 64  # samples of the earlier siblings, where the law of a child depends on them


def divergence(
    rule: Rule, p: np.ndarray, law: Law, q: np.ndarray | None = None, *, count: int, top: Sequence[int] = ()
) -> float | None:
    """Total variation between the law of the token that `rule` puts after a node and the target's law there.

    The rule's law is over the draws of the node's children and the rule's own coins, given that the node was accepted. It
    is exact for all draft laws but WITHOUT_REPLACEMENT with several children, where the earlier siblings' tokens are
    averaged over 64 draws. The children are taken in the order they are drawn: it is left out that `TypicalAcceptance`
    prefers a later sibling if more was accepted below it.

    Args:
        rule: the result is 0 for lossless rules, and None for others without a `trial`.
        p: [vocab] the target's law at the node.
        law: how the children are drawn.
        q: [vocab] weights of the draft's law at the node; not needed for POINT.
        count: number of children.
        top: tokens of the children that are not random: all of them for POINT, all but the first for SAMPLED_THEN_TOP.
    """
    if rule.lossless:
        return 0.0
    if type(rule).trial is Rule.trial:
        return None
    random = np.random.default_rng(0)
    repeats = _DRAWS if excludes_elders(law) and count > 1 else 1
    emitted = [_emitted(rule, p, law, q, count, top, random) for _ in range(repeats)]
    return float(abs(np.mean(emitted, 0) - p).sum() / 2)


def _emitted(rule: Rule, p: np.ndarray, law: Law, q, count: int, top: Sequence[int], random) -> np.ndarray:
    """[vocab]: the law of the next token, given one draw of the earlier siblings where laws depend on them."""
    emitted, unmet, owed = np.zeros_like(p), 1.0, p  # unmet: chance that no child so far was accepted
    # Tokens that are not known yet stand as 0: no child's law depends on them.
    tokens = [0] * (count - len(top)) + list(top)
    weights = np.zeros_like(p) if q is None else np.array(q, dtype=np.float64)
    for slot in range(count):
        child = normalised(child_weights(law, weights, tokens, slot))
        hit, owed = rule.trial(owed, child)
        emitted += unmet * child * hit
        failed = child * (1 - hit)
        if not failed.sum() > 0:
            return emitted
        unmet *= failed.sum()
        if excludes_elders(law) and slot + 1 < count:
            tokens[slot] = random.choice(len(p), p=failed / failed.sum())
    return emitted + unmet * owed
