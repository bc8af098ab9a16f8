"""How much of a chain the best verifier accepts, for toy models, by enumerating all texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from specdec.checks import as_int, as_ints, check_callable
from specdec.theory.ceilings import normalised

TextLaw = Callable[[tuple[int, ...]], ArrayLike]  # from a text to the law [vocab] of its next token
_CURE = "pass a function from a text to the law of its next token"


def chain_optimum(target: TextLaw, draft: TextLaw, depth: int, prompt: Sequence[int] = ()) -> float:
    """The largest expected acceptance length of any lossless verifier of one drafted path: that of block verification.

    A path that ends at its i-th token is accepted as a whole with probability reach_i = min(1, reach_i-1 p / q). Drafting on
    does not change the law of what was accepted, so at least i tokens are accepted with probability E reach_i. Sun et al.,
    arXiv:2403.10444, show that this is optimal. Enumerates vocab ** depth texts.

    Args:
        target, draft: laws after any text.
        depth: length of the path.
    """
    depth, prompt = as_int("depth", depth, 0), as_ints("prompt", prompt)
    check_callable("target", target, _CURE)
    check_callable("draft", draft, _CURE)

    def accepted(text: tuple[int, ...], reach: float) -> float:
        if reach == 0 or len(text) - len(prompt) == depth:
            return 0.0
        p, q = normalised(target(text)), normalised(draft(text))
        ahead = {int(x): min(1.0, reach * p[x] / q[x]) for x in np.flatnonzero(q)}
        return sum(q[x] * (r + accepted((*text, x), r)) for x, r in ahead.items())

    return 1 + accepted(tuple(prompt), 1.0)
