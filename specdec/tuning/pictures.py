"""A plan as pictures of matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.display.picture import BLUE, GREEN, GREY, ORANGE, PALETTE
from specdec.display.plots import new_axes
from specdec.tuning.tables import shape

if TYPE_CHECKING:
    from specdec.tuning.plan import Plan

# That a picture shows.
_ROWS = 8


def speedups(plan: Plan, axes: Any = None) -> Any:
    """Predicted and measured speed-ups of the best candidates, with 95 % intervals, and this machine's noise around 1."""
    if not plan.rows:
        raise ValueError("This plan has no rows to draw: it was loaded, or time ended before anything was foretold.")
    axes, rows = new_axes(axes), plan.rows[:_ROWS]
    for part, colour, shift in (("predicted", BLUE, -0.12), ("measured", ORANGE, 0.12)):
        known = [(i, found) for i, row in enumerate(rows) if (found := getattr(row.speedup, part)) is not None]
        ends = [(f.value - (f.low or f.value), (f.high or f.value) - f.value) for _, f in known]
        at = [i + shift for i, _ in known]
        if known:
            spread = np.clip(np.array(ends).T, 0, None)
            axes.errorbar([f.value for _, f in known], at, xerr=spread, fmt="o", color=colour, capsize=3, label=part)
    if plan.noise is not None and plan.noise.low is not None and plan.noise.high is not None:
        axes.axvspan(plan.noise.low, plan.noise.high, color=GREY, alpha=0.2, label="noise")
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row.candidate.name}, {shape(row.candidate)}" for row in rows])
    axes.invert_yaxis()
    axes.set(title="Speed-up over decoding without a draft", xlabel="speed-up")
    axes.legend()
    return axes


def roofline(plan: Plan, axes: Any = None) -> Any:
    """Times of the target's pass by nodes, measured, and the least that memory and arithmetic of this machine allow."""
    axes, found = new_axes(axes), _roofline(plan)
    nodes = np.linspace(1, max(found.nodes), 64)
    axes.plot(found.nodes, 1e3 * np.array(found.seconds), "o-", color=GREEN, label="measured")
    axes.plot(nodes, [1e3 * found.least(n) for n in nodes], color=GREY, label="least: memory, then arithmetic")
    axes.set(title="The target's pass", xlabel="nodes of a row's tree", ylabel="time (ms)", ylim=(0, None))
    axes.legend()
    return axes


def time_of_a_step(plan: Plan, axes: Any = None) -> Any:
    """Where the time of a step with the plan's drafts goes."""
    axes, left = new_axes(axes), 0.0
    for (name, share), colour in zip(_roofline(plan).parts().items(), PALETTE, strict=False):
        axes.barh([plan.name], [share], left=left, color=colour, label=f"{name}, {share:.0%}")
        left += share
    axes.set(title="Where the time of a step goes", xlim=(0, 1), xlabel="share of a step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    return axes


def _roofline(plan: Plan) -> Any:
    if plan.roofline is None:
        raise ValueError(
            "This plan has no roofline: it was loaded, or time ended before steps were measured, or its target is no "
            "transformers model."
        )
    return plan.roofline
