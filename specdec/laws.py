"""The law of a child: the one home of what `specdec.Law` means. Rules, theory, displays and certificates ask here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from specdec.checks import as_int
from specdec_kernels.reference.laws import Law, excludes_elders, is_random, is_struck

if TYPE_CHECKING:
    from specdec.sampling import Sampling

__all__ = ["Law", "excludes_elders", "is_random", "is_struck"]  # imported from here, the rest is defined here

# the laws under which a child is random
SAMPLED = tuple(law for law in Law if law != Law.PADDING and is_random(law, 0))


def as_law(law: Law | int) -> Law:
    """The law of this number, for nodes with children; raises ValueError for PADDING, and if there is none."""
    names = ", ".join(f"Law.{each.name}" for each in Law if each != Law.PADDING)
    law = Law(as_int("law", law, 0, len(Law) - 1, f"choose one of {names}"))
    if law == Law.PADDING:
        raise ValueError(f"law=PADDING marks absent nodes; choose one of {names}.")
    return law


def drawn_laws(law: Law, sampling: Sampling) -> frozenset[Law]:
    """The laws that `specdec.trees.draw` may record when asked for `law`."""
    if sampling.temperature == 0:
        return frozenset({Law.POINT})
    # where the points that follow a draw are the whole support, nothing is drawn
    mixed = is_random(law, 0) and not is_random(law, 1)
    return frozenset({law, Law.POINT} if mixed else {law})


def child_weights(law: Law | int, weights: np.ndarray, tokens: Sequence[int], slot: int) -> np.ndarray:
    """[vocab], not normalised: what the child in place `slot` was drawn by, given its siblings.

    Args:
        law: how the siblings were drawn.
        weights: [vocab] of the draft at their parent.
        tokens: of all siblings, in order; of those that are not struck out for this child, any number will do.
    """
    if not is_random(law, slot):
        return np.eye(1, len(weights), tokens[slot])[0]
    left = weights.copy()
    left[[token for place, token in enumerate(tokens) if is_struck(law, slot, place)]] = 0
    return left


def drafts(law: Law, weights: np.ndarray, count: int) -> dict[tuple[int, ...], float]:
    """{tokens of `count` children in order: probability}; fewer of them where the support of `weights` [vocab] runs out.

    Points are the most probable tokens.
    """
    draws = sum(is_random(law, slot) for slot in range(count))
    ranked = [int(x) for x in np.argsort(-weights, kind="stable") if weights[x] > 0]
    top = tuple(ranked[: count - draws])
    found = {(): 1.0}
    for slot in range(draws):
        found = {
            (*drawn, x): chance * float(left[x] / left.sum())
            for drawn, chance in found.items()
            for left in [child_weights(law, weights, (*drawn, *[0] * (draws - slot), *top), slot)]
            for x in ranked
            if left[x] > 0
        } or found
    return {(*drawn, *top): chance for drawn, chance in found.items()}


def normalised(weights: np.ndarray) -> np.ndarray:
    """[vocab] float64: the law that has these weights."""
    weights = weights.astype(np.float64)
    return weights / weights.sum()
