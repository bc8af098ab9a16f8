"""The law of a child: the one home of what `specdec.Law` means. Rules, theory, displays and certificates ask here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from specdec.checks import as_int
from specdec_kernels.reference.laws import Law, excludes_elders, is_random, is_struck

if TYPE_CHECKING:
    from specdec.sampling import Sampling

# defined in specdec_kernels, imported from here
__all__ = ["Law", "excludes_elders", "is_random", "is_struck"]

# the laws under which a child is random
SAMPLED = tuple(law for law in Law if law != Law.PADDING and is_random(law, 0))


def as_law(law: Law | int) -> Law:
    """The law of this number. Raises ValueError if there is none, and for PADDING, by which no children are drawn."""
    names = ", ".join(f"Law.{each.name}" for each in Law if each != Law.PADDING)
    law = Law(as_int("law", law, 0, len(Law) - 1, f"choose one of {names}"))
    if law == Law.PADDING:
        raise ValueError(f"law=PADDING marks absent nodes; choose one of {names}.")
    return law


def drawn_laws(law: Law, sampling: Sampling) -> frozenset[Law]:
    """The laws that `specdec.trees.draw` may record when asked for `law`."""
    if sampling.temperature == 0:
        return frozenset({Law.POINT})
    # Where the most probable tokens are all that is possible, nothing is left to draw: every child is a point.
    mixed = is_random(law, 0) and not is_random(law, 1)
    return frozenset({law, Law.POINT} if mixed else {law})


def child_weights(law: Law | int, weights: np.ndarray, tokens: Sequence[int], slot: int) -> np.ndarray:
    """[vocab], not normalised: the weights that the child in place `slot` was drawn by, given its siblings.

    Args:
        law: how the siblings were drawn.
        weights: [vocab] the draft's weights after their parent.
        tokens: the token of every sibling, in order. Only this child's and those struck out for it are read.
    """
    if not is_random(law, slot):
        return np.eye(1, len(weights), tokens[slot])[0]
    left = weights.copy()
    left[[token for place, token in enumerate(tokens) if is_struck(law, slot, place)]] = 0
    return left


def drafts(law: Law, weights: np.ndarray, count: int) -> dict[tuple[int, ...], float]:
    """{tokens of `count` children in order: probability}, for a draft with these `weights` [vocab].

    Points are the most probable tokens. There are fewer tokens where the support runs out.
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
