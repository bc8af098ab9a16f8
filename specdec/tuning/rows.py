"""A candidate with what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import Candidate, Foretold

Verdict = Literal["pays", "does not pay", "cannot tell"]


_WITHIN = 1.96  # standard errors to either end of a 95 % interval
_UNTOLD = 0.04  # standard error of predictions, as a share, whatever their interval: what prices of steps leave out
_LEAST = 0.005  # of measurements


@dataclass(frozen=True)
class Speedup:
    """Over decoding without a draft.

    Args:
        predicted: from the target's texts and the measured times; None if it cannot be foretold.
        measured: of decoding; None if it was not decoded.
    """

    predicted: Estimate | None = None
    measured: Estimate | None = None

    @property
    def estimate(self) -> Estimate | None:
        """Both together, each weighted by how sure it is; None if neither is known.

        Predictions leave out what prices do not tell; in what is measured there is the chance of drafts.
        """
        known = {"predicted": self.predicted, "measured": self.measured}
        sure = {name: found for name, found in known.items() if found is not None and found.low is not None}
        if not sure:
            return self.measured or self.predicted
        errors = {name: max(_error(found), _UNTOLD if name == "predicted" else _LEAST) for name, found in sure.items()}
        weights = {name: 1 / error**2 for name, error in errors.items()}
        whole = sum(weights.values())
        middle = sum(weights[name] * math.log(found.value) for name, found in sure.items()) / whole
        ends = (math.exp(middle + sign * _WITHIN * whole**-0.5) for sign in (-1, 1))
        return Estimate(math.exp(middle), *ends)

    def __str__(self) -> str:
        parts = {"predicted": self.predicted, "measured": self.measured}
        return ", ".join(f"{name} {part}" for name, part in parts.items() if part is not None) or "unknown"


def _error(found: Estimate) -> float:
    """The standard error of an estimate, as a share of it."""
    assert found.low is not None and found.high is not None
    return (found.high - found.low) / (2 * _WITHIN * found.value)


@dataclass(frozen=True)
class Row:
    """A candidate, and what is known of it."""

    candidate: Candidate
    foretold: Foretold | None
    speedup: Speedup
