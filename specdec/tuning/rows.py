"""A candidate with what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

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

        They are of the same prompts, so that both do not make it surer: its ends, too, are means. An interval that holds 1 in
        both holds it here.
        """
        known = [(self.predicted, _PREDICTED), (self.measured, _MEASURED)]
        sure = [_at_least(found, error) for found, error in known if found is not None and found.low is not None]
        if not sure:
            return self.measured or self.predicted
        ends = np.log([[found.value, found.low, found.high] for found in sure])
        return Estimate(*np.exp(np.average(ends, 0, (ends[:, 2] - ends[:, 1]) ** -2.0)).tolist())

    def __str__(self) -> str:
        parts = {"predicted": self.predicted, "measured": self.measured}
        if None not in parts.values():
            parts["together"] = self.estimate
        return ", ".join(f"{name} {part}" for name, part in parts.items() if part is not None) or "unknown"


def _at_least(found: Estimate, error: float) -> Estimate:
    """The same with an interval of at least so large a standard error, as a share."""
    assert found.low is not None and found.high is not None
    wide = math.exp(_WITHIN * error)
    low = max(min(found.low, found.value / wide), 1e-9 * found.value)
    return Estimate(found.value, low, max(found.high, found.value * wide))


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
