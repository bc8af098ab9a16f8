"""Plots of named traces. Each function draws on the matplotlib axes it is given, or on new ones, and returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specdec.display.picture import BLUE, GREEN, GREY, ORANGE, PALETTE
from specdec.theory import Costs, chain_speed_ups
from specdec.trace.trace import PARTS, Trace


def acceptance_by_depth(traces: Mapping[str, Trace], axes: Any = None) -> Any:
    """The acceptance rate at each depth, as in `Trace.summary`."""
    axes = new_axes(axes)
    for i, (name, trace) in enumerate(traces.items()):
        rates = trace.summary()["acceptance_rate"]
        axes.plot(range(1, len(rates) + 1), rates, marker="o", color=PALETTE[i % len(PALETTE)], label=name)
    axes.set(title="How far drafts are accepted", xlabel="depth in the draft (tokens)", ylim=(0, 1.05))
    axes.set(ylabel="accepted, of those that were reached (share)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return axes


def speed_up_by_length(
    rates: Sequence[float], costs: Costs, measured: Mapping[int, Mapping[str, Any]] | None = None, axes: Any = None
) -> Any:
    """The predicted speed-ups of chains of 0, 1, ... drafted tokens, and measured ones.

    Args:
        rates: acceptance rate by depth, as in `Trace.summary`.
        costs: what forward passes take: `specdec.theory.measure_costs`.
        measured: {length: {"median": ..., "low": ..., "high": ...}}; "low" and "high" may be missing or None.
    """
    axes = new_axes(axes)
    predicted = chain_speed_ups(rates, costs)
    axes.plot(range(len(predicted)), predicted, color=BLUE, label="predicted")
    for i, (length, found) in enumerate(sorted((measured or {}).items())):
        known = found.get("low") is not None
        spread = [[found["median"] - found["low"]], [found["high"] - found["median"]]] if known else None
        label = "_measured" if i else "measured (95 % interval)"  # one entry in the legend
        axes.errorbar([length], [found["median"]], yerr=spread, fmt="o", color=ORANGE, capsize=3, label=label)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(
        title="Speed-up by draft length",
        xlabel="drafted tokens per step",
        ylabel="speed-up (1 is decoding without drafts)",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return axes


def time_per_step(traces: Mapping[str, Trace], axes: Any = None) -> Any:
    """Mean milliseconds of a step: reading prompts that enter, drafting, the target's forward pass, all the rest."""
    axes, names = new_axes(axes), list(traces)
    summaries = [trace.summary() for trace in traces.values()]
    below = [0.0] * len(names)
    # the blue of drafted tokens for drafting, the green of the target's own for its forward passes
    for part, colour in zip(PARTS, (ORANGE, BLUE, GREEN, GREY), strict=True):
        times = [1e3 * found[part] / max(found["target_forwards"], 1) for found in summaries]
        axes.bar(names, times, bottom=below, color=colour, label=part.removesuffix("_seconds"))
        below = [a + b for a, b in zip(below, times, strict=True)]
    # with room for the legend above
    axes.set(title="Where the time of a step goes", ylabel="time per step (ms)", ylim=(0, 1.2 * max(below, default=1)))
    axes.legend(loc="upper center", ncols=len(PARTS))
    return axes


def ceiling_shares(traces: Mapping[str, Trace], axes: Any = None) -> Any:
    """Accepted drafted tokens, as a share of the most that a rule deciding node by node accepts on average.

    Block and traversal verification may exceed 1: they look further down the tree before they decide. Lossy rules may, as they
    accept what the target would not have said, and in few tokens any rule may by chance.
    """
    shares = {name: trace.summary().get("ceiling_share") for name, trace in traces.items()}
    if unknown := [name for name, share in shares.items() if share is None]:
        raise ValueError(f'{unknown}: ceilings are not known; record with trace="ceiling", and with a drafter.')
    axes = new_axes(axes)
    axes.bar(list(shares), list(shares.values()), color=BLUE)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(title="Accepted, of what one node at a time allows", ylabel="share of the one-step ceiling")
    if any(share > 1 for share in shares.values() if share is not None):
        axes.set(xlabel="above 1: a rule that looks below a node, a lossy rule, or chance")
    return axes


def new_axes(axes: Any, count: int | None = None) -> Any:
    """The axes that were given, or else new ones: with a count, so many, one below the other over one axis."""
    if axes is not None:
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots are drawn by matplotlib: pip install 'specdec[pictures]'") from error
    if count is None:
        return plt.subplots(layout="constrained")[1]
    size = (8, 0.5 + 2.5 * count)
    return plt.subplots(count, 1, sharex=True, squeeze=False, figsize=size, layout="constrained")[1][:, 0]
