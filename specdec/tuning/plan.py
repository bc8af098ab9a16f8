"""What a search has found: which drafter, tree and rule, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from specdec.drafters import Drafter
from specdec.rules import Rule
from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import Candidate, Foretold
from specdec.tuning.roofline import Roofline

Verdict = Literal["pays", "does not pay", "cannot tell"]


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
    def value(self) -> float | None:
        """What was measured, or else predicted."""
        known = self.measured or self.predicted
        return None if known is None else known.value

    def __str__(self) -> str:
        parts = {"predicted": self.predicted, "measured": self.measured}
        return ", ".join(f"{name} {part}" for name, part in parts.items() if part is not None) or "unknown"


@dataclass(frozen=True)
class Row:
    """A candidate, and what is known of it."""

    candidate: Candidate
    foretold: Foretold | None
    speedup: Speedup


@dataclass(frozen=True)
class Plan:
    """What `specdec.tune` returns.

    Args:
        name: of the drafter; "autoregressive" if it is best to draft nothing.
        drafter: for `generate(drafter=...)`; None if it is best to draft nothing.
        rule: for `generate(rule=...)`.
        speedup: of this choice; 1 if nothing is drafted.
        verdict: whether the best drafter pays: "pays", "does not pay" or, as intervals hold 1 or less than this machine's
            noise, "cannot tell".
        reason: why, in words: what would have to change by how much.
        rows: all that was looked at, the best first.
        refused: what was not compared, and why.
        notes: what else is to be known: what was not tried, prompts that were left out.
        noise: decoding without a draft over itself, or the spread of single steps.
        roofline: where the time goes; None if that was not reached, or the target is no transformers model.
        conditions: what it holds for, by name.
    """

    name: str
    drafter: Drafter | None
    rule: Rule
    speedup: Speedup
    verdict: Verdict
    reason: str
    rows: tuple[Row, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    noise: Estimate | None = None
    roofline: Roofline | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        chosen = self.name if self.drafter is None else f"{self.name}: {self.drafter}, {type(self.rule).__name__}()"
        return f"{chosen}\nspeed-up {self.speedup}\n{self.reason}"

    def table(self, most: int = 12) -> str:
        """The best candidates as markdown, with what is said below it: reasons, refusals and notes."""
        from specdec.tuning.tables import table

        return table(self, most)

    def picture(self, axes: Any = None) -> Any:
        """Predicted and measured speed-ups with their intervals, on axes of matplotlib."""
        from specdec.tuning.pictures import speedups

        return speedups(self, axes)

    def roofline_picture(self, axes: Any = None) -> Any:
        """The target's passes by their nodes, against what this machine can do, on axes of matplotlib."""
        from specdec.tuning.pictures import roofline

        return roofline(self, axes)

    def time_picture(self, axes: Any = None) -> Any:
        """Where the time of a step goes, on axes of matplotlib."""
        from specdec.tuning.pictures import time_of_a_step

        return time_of_a_step(self, axes)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the choice and the table as YAML. Models are not in it: `load` is given them again."""
        from specdec.tuning.files import save

        save(self, path)

    @staticmethod
    def load(path: str | PathLike[str], target: Any, drafters: Any = None) -> Plan:
        """A plan that was saved, with its drafter made anew. See `specdec.tuning.files.load`."""
        from specdec.tuning.files import load

        return load(path, target, drafters)

    def _repr_html_(self) -> str:
        from specdec.tuning.tables import html

        return html(self)
