"""What a search has found: which drafter, tree and rule, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from specdec.drafters import Drafter
from specdec.rules import Rule
from specdec.tuning import files, pictures, tables
from specdec.tuning.estimate import Estimate
from specdec.tuning.roofline import Roofline
from specdec.tuning.rows import Row, Speedup, Verdict

# Rows that a table shows.
_MOST = 12


@dataclass(frozen=True, repr=False)
class Plan:
    """What `specdec.tune` returns.

    Args:
        name: of the drafter; "autoregressive" if it is best to draft nothing.
        drafter: for `generate(drafter=...)`; None if it is best to draft nothing.
        rule: for `generate(rule=...)`.
        speedup: of this choice; 1 if nothing is drafted.
        verdict: whether the best drafter pays: "pays", "does not pay", or "cannot tell" if the interval holds 1 or lies
            within this machine's noise.
        reason: why, in words: what would have to change by how much.
        rows: all that was looked at, the best first.
        refused: what was not compared, and why.
        notes: what else is to be known: what was not tried, prompts that were left out.
        noise: decoding without a draft over itself, or the spread of single steps.
        roofline: where the time goes; None if that was not reached, or the target is no transformers model.
        conditions: what it holds for, by name.
        saved: the table, of a plan that was loaded.
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
    saved: str = ""

    def __str__(self) -> str:
        if self.drafter is None:
            return f"{self.name}: nothing is drafted"
        return f"{self.name}: {self.drafter}, {type(self.rule).__name__}()\nspeed-up {self.speedup}"

    __repr__ = __str__

    def table(self, most: int = _MOST) -> str:
        """The best candidates as markdown, with what is said below it: reasons, refusals and notes."""
        return self.saved or tables.table(self, most)

    def picture(self, axes: Any = None) -> Any:
        """Predicted and measured speed-ups with their intervals, on axes of matplotlib."""
        return pictures.speedups(self, axes)

    def roofline_picture(self, axes: Any = None) -> Any:
        """The target's passes by their nodes, against what this machine can do, on axes of matplotlib."""
        return pictures.roofline(self, axes)

    def time_picture(self, axes: Any = None) -> Any:
        """Where the time of a step goes, on axes of matplotlib."""
        return pictures.time_of_a_step(self, axes)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the choice and the table as YAML. Models are not in it: `load` is given them again."""
        files.save(self, path)

    @staticmethod
    def load(path: str | PathLike[str], target: Any, drafters: Any = None) -> Plan:
        """A plan that was saved, with its table but without its rows, and with its drafter made anew.

        Args:
            path: the file.
            target: the target that it was made for.
            drafters: as for `tune`, by the same names; those that are not the plan's are not needed.

        Raises:
            ValueError: it is no plan, or one for another target, or its drafter is not among those that are given.
        """
        return Plan(**files.load(path, target, drafters))

    def _repr_html_(self) -> str:
        return tables.html(self, _MOST)
