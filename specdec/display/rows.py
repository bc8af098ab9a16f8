"""The rows of a batch over time, as plots: how many were running, and which text each of them held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec.checks import check_kind
from specdec.display.plots import new_axes
from specdec.trace.serving import timed
from specdec.trace.trace import Trace

_LABELLED = 0.03  # share of the longest trace's time that a bar must take to have room for the number of its text
_COLOURS = 10  # that matplotlib has by name


def rows_running(traces: Trace | Mapping[str, Trace], axes: Any = None) -> Any:
    """How many rows got tokens in each step, over time. A step begins with the reading of the prompts that enter."""
    axes, traces = new_axes(axes), _named(traces)
    for i, (name, trace) in enumerate(traces.items()):
        steps = list(timed(trace))
        running = [sum(n > 0 for n in step.emitted) for step, _, _ in steps]
        edges = [0.0, *(end for _, _, end in steps)]
        label = f"{name} (mean share {trace.summary()['rows_running']:.0%})"
        axes.stairs(running, edges, label=label, color=f"C{i % _COLOURS}", fill=True, alpha=0.4)
    most = max((len(step.held) for trace in traces.values() for step in trace.steps), default=1)
    # with room for the legend above
    axes.set(title="Rows running", xlabel="time (s)", ylabel="rows", ylim=(0, 1.3 * most))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return axes


def rows(traces: Trace | Mapping[str, Trace], axes: Any = None) -> Any:
    """Which text each row held, from the step of its first tokens to that of its last; white is idle.

    Args:
        traces: one, or several by name, drawn one below the other, over one time axis. A bar has the number of its text if
            there is room.
        axes: [trace]: matplotlib axes, one for each trace; None makes new ones.

    Returns:
        The axes.
    """
    traces = _named(traces)
    axes = new_axes(axes, len(traces))
    most = max((end for trace in traces.values() for _, _, end in timed(trace)), default=0.0)
    for own, (name, trace) in zip(axes, traces.items(), strict=True):
        for (row, text), (start, end) in stretches(trace).items():
            own.barh(row, end - start, left=start, height=0.9, color=f"C{text % _COLOURS}", edgecolor="white")
            if end - start >= _LABELLED * most:
                middle = (start + end) / 2
                own.text(middle, row, str(text), ha="center", va="center", fontsize="small", color="white")
        own.set(title=f"{name}: {trace.summary()['rows_running']:.0%} of the rows running", ylabel="row")
        own.set_ylim(max((len(step.held) for step in trace.steps), default=1) - 0.5, -0.5)
        own.yaxis.get_major_locator().set_params(integer=True)
    axes[-1].set(xlabel="time (s)")
    return axes


def _named(traces: Any) -> Mapping[str, Trace]:
    if isinstance(traces, Trace):
        return {"run": traces}
    check_kind("traces", traces, Mapping, "pass a trace, such as generation.trace, or traces by name")
    return traces


def stretches(trace: Trace) -> dict[tuple[int, int], tuple[float, float]]:
    """(row, text): beginning of the step in which the text got its first tokens in that row, and end of that of its last."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for step, start, end in timed(trace):
        for row, (text, tokens) in enumerate(zip(step.held, step.emitted, strict=True)):
            if tokens:
                found[row, text] = (found.get((row, text), (start, end))[0], end)
    return found
