"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from specdec.drafters import Paused
from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import Candidate
from specdec.tuning.rows import Row
from specdec.tuning.shapes import depths, is_chain

if TYPE_CHECKING:
    from specdec.tuning.plan import Plan

HEADER = ("drafter", "tree", "rule", "acceptance length (95 %)", "step", "predicted (95 %)", "measured (95 %)")
_WORDS = (
    "Acceptance length: tokens of a step, of which one is the target's own. Step: its time, in steps without a draft; the loop "
    "is what it takes besides drafting and the target's pass. Its own: the tree that the drafter came with."
)


def table(plan: Plan, most: int) -> str:
    """A markdown table, and below it what is said in words."""
    rows = [HEADER, ["---"] * len(HEADER), *map(_cells, plan.rows[:most])]
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", *_said(plan, most)])


def html(plan: Plan, most: int) -> str:
    """The same for a notebook, after what was chosen."""
    if plan.saved:
        return f"{_paragraphs(str(plan).splitlines())}<pre>{escape(plan.saved)}</pre>"
    cells = [HEADER, *map(_cells, plan.rows[:most])]
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f"{_paragraphs(str(plan).splitlines())}<table>{body}</table>{_paragraphs(_said(plan, most))}"


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _said(plan: Plan, most: int) -> list[str]:
    """What is said below a table of so many rows."""
    said, left = [plan.reason, *plan.notes], len(plan.rows) - most
    if left > 0:
        said.append(f"{left} more are not shown.")
    if plan.noise is not None:
        said.append(f"Noise: decoding without a draft against itself, {plan.noise}.")
    few = {row.candidate.name: row.foretold.texts for row in plan.rows if row.foretold}
    every = plan.conditions.get("texts", 0)
    said += [f"{name} was foretold from {count} of {every} texts." for name, count in few.items() if count < every]
    untold = {row.candidate.name: row.untold for row in plan.rows if row.untold}
    said += [f"{name} was not foretold: {why}" for name, why in untold.items()]
    said += [f"{name} was not compared: {why}" for name, why in plan.refused.items()]
    held = "; ".join(f"{name} {value}" for name, value in plan.conditions.items())
    return [*said, f"It holds for: {held}.", _WORDS]


def shape(candidate: Candidate) -> str:
    """A tree in words."""
    parents = candidate.parents
    if parents is None:
        return "paused" if isinstance(candidate.drafter, Paused) else "its own"
    if is_chain(parents):
        return f"chain of {len(parents) - 1}"
    return f"tree of {len(parents)}, {' '.join(map(str, widths(parents)))}"


def widths(parents: Sequence[int]) -> list[int]:
    """How many nodes there are at each depth after the root."""
    depth = depths(parents)
    return [depth.count(level) for level in range(1, max(depth) + 1)]


def _cells(row: Row) -> list[str]:
    found, candidate = row.foretold, row.candidate
    return [
        candidate.name,
        shape(candidate),
        type(candidate.rule).__name__,
        _text(found and found.acceptance),
        f"{found.step:.2f}" if found else "-",
        _text(row.speedup.predicted),
        _text(row.speedup.measured),
    ]


def _text(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)
