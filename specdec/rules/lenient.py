"""Lenient rejection: sibling rejection that compares p with a fraction of q (Leviathan et al., arXiv:2211.17192, appendix).

Not lossless. With one sampled child no token becomes more likely than p(x) / lenience: it is accepted with mass
min(q, p / lenience), and the mass then left over, at most sum (q - p)+ = sum (p - q)+, is spread by (p - q)+.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specdec.checks import as_float, put
from specdec.rules.residual import residual
from specdec.rules.sibling import SiblingRejection


@dataclass(frozen=True)
class LenientRejection(SiblingRejection):
    """Accept a child with probability min(1, p / (lenience q)), and go on as sibling rejection does.

    Args:
        lenience: in (0, 1]; 1 is sibling rejection.
    """

    lossless = False

    lenience: float = 0.5  # type: ignore[misc] - a class variable in SiblingRejection

    def __post_init__(self) -> None:
        put(self, lenience=as_float("lenience", self.lenience, "(0, 1]", "1 is SiblingRejection"))

    def trial(self, owed: np.ndarray, law: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hit = np.divide(owed, self.lenience * law, out=np.ones_like(owed), where=law > 0)
        return np.minimum(hit, 1), residual(1, owed, law)[1]
