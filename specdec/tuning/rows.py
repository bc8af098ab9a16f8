"""A candidate with what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import Candidate, Foretold

Verdict = Literal["pays", "does not pay", "cannot tell"]


# Standard errors from the middle to either end of a 95 % interval.
_WITHIN = 1.96
# The least standard error, as a share, that a prediction is credited with: prices of steps leave things out.
_PREDICTED = 0.04
# The same of a measurement.
_MEASURED = 0.005


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
        errors = {
            name: max(_error(found), _PREDICTED if name == "predicted" else _MEASURED) for name, found in sure.items()
        }
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
    """A candidate, and what is known of it.

    Args:
        candidate: the candidate.
        foretold: what is foretold of it; None where only decoding can tell.
        untold: why nothing is foretold; "" if something is.
        measured: its speed-up in decoding; None if it was not decoded.
    """

    candidate: Candidate
    foretold: Foretold | None = None
    untold: str = ""
    measured: Estimate | None = None

    @property
    def speedup(self) -> Speedup:
        """Its speed-up, foretold and measured."""
        return Speedup(self.foretold.speedup if self.foretold else None, self.measured)
