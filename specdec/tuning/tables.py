"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from specdec.drafters import Paused
from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import Candidate
from specdec.tuning.rows import Row

if TYPE_CHECKING:
    from specdec.tuning.plan import Plan

HEADER = ("drafter", "tree", "rule", "acceptance length (95 %)", "step", "predicted (95 %)", "measured (95 %)")


def table(plan: Plan, most: int) -> str:
    """A markdown table, and below it what is said in words."""
    rows = [HEADER, ["---"] * len(HEADER), *map(_cells, plan.rows[:most])]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    left = len(plan.rows) - most
    said = [plan.reason, *plan.notes]
    if left > 0:
        said.append(f"{left} more were foretold, and are slower.")
    if plan.noise is not None:
        said.append(f"Noise: decoding without a draft against itself, {plan.noise}.")
    said += [f"{name} was not compared: {why}" for name, why in plan.refused.items()]
    held = ", ".join(f"{name} {value}" for name, value in plan.conditions.items())
    return "\n".join([*lines, "", *said, f"It holds for: {held}.", "Step: in steps without a draft."])


def html(plan: Plan) -> str:
    """For a notebook."""
    cells = [HEADER, *(_cells(row) for row in plan.rows[:12])]
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    said = "".join(f"<p>{escape(line)}</p>" for line in str(plan).splitlines())
    return f"{said}<table>{body}</table>"


def shape(candidate: Candidate) -> str:
    """A tree in words."""
    parents = candidate.parents
    if parents is None:
        return "paused" if isinstance(candidate.drafter, Paused) else "its own"
    if list(parents) == list(range(-1, len(parents) - 1)):
        return f"chain of {len(parents) - 1}"
    return f"tree of {len(parents)}, {' '.join(map(str, widths(parents)))}"


def widths(parents: Sequence[int]) -> list[int]:
    """How many nodes there are at each depth after the root."""
    depth = [0]
    for parent in parents[1:]:
        depth.append(depth[parent] + 1)
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
