"""The picture of a sweep, which shows speed-ups as lines, as bars or as a map, whichever fits what varies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.bench.charts.bars import bars
from experiments.bench.charts.drawing import Panel, Plot, Series, Sheet, colour
from experiments.bench.charts.heat_map import heat_map
from experiments.bench.charts.lines import lines
from experiments.bench.swept import TASK, Sweep, number, words

LINES = 6  # at most in a panel
UNRESOLVED = "~: not told apart from no difference."
INTERVALS = "Thin lines: 95 % intervals."
BARS = f"{INTERVALS} {UNRESOLVED} tokens/step: tokens emitted per forward pass of the target."


def picture(sweep: Sweep) -> Sheet:
    """Bars by task or by the only thing that varies, lines over a number of at least three values, or else a map."""
    base = next(iter(sweep.jobs[0]["figures"])).replace("_", " ")
    title = f"{sweep.shared.get('target', 'Sweep')}: speed-up over {base} decoding in the same setting (1: as fast)"
    values = {axis: sweep.values(axis) for axis in range(len(sweep.axes))}
    lengths = {axis: len(own) for axis, own in values.items() if len(own) > 2 and all(map(number, own))}
    longest = None if TASK in sweep.axes else max(lengths, key=lengths.__getitem__, default=None)
    if longest is not None and max(map(len, _panels(sweep, longest).values())) <= LINES:
        note = f"{INTERVALS} Hollow: not told apart from no difference."
        return _sheet(title, sweep, longest, lines, note)
    if TASK in sweep.axes or len(sweep.axes) < 2:
        return _sheet(title, sweep, max(len(sweep.axes) - 1, 0), bars, BARS)
    note = f"Blue is faster, orange slower. {UNRESOLVED} -: refused, or not measured."
    return Sheet(title, [heat_map(sweep)], note)


def of_methods(figures: dict[str, Any]) -> Sheet:
    """Bars of the methods of one result."""
    most = _most(list(figures.values()))
    plot = Plot("", "", list(figures), {"": figures}, [""], most)
    return Sheet(f"Speed-up over {next(iter(figures))} (1: as fast)", [bars(plot)], BARS)


def _sheet(title: str, sweep: Sweep, axis: int, draw: Callable[[Plot], Panel], note: str) -> Sheet:
    panels, most = _panels(sweep, axis), _most([point.figures for point in sweep.points])
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    plots = (Plot(setting, *_axis(sweep, axis), series, names, most) for setting, series in panels.items())
    return Sheet(title, [*map(draw, plots)], note, {name: colour(names, name) for name in names})


def _axis(sweep: Sweep, axis: int) -> tuple[str, list[str]]:
    """Its key and its values; a single value without a name where nothing varies."""
    return (sweep.axes[axis], sweep.values(axis)) if sweep.axes else ("", [""])


def _panels(sweep: Sweep, axis: int) -> dict[str, Series]:
    """By panel and line, the figures by their value on an axis. Lines are methods, and panels settings of the other axes; of a
    single method, lines are settings.
    """
    several = len({point.method for point in sweep.points}) > 1
    found: dict[str, Series] = {}
    for point in sweep.points:
        others = [words(key, at) for key, at in zip(sweep.axes, point.at, strict=True)]
        value = point.at[axis] if others else ""
        setting = ", ".join(others[:axis] + others[axis + 1 :])
        panel, line = (setting, point.method) if several else ("", setting or point.method)
        found.setdefault(panel, {}).setdefault(line, {}).setdefault(value, point.figures)
    return found


def _most(rows: list[dict[str, Any]]) -> float:
    return max(1.0, *(row["speed_up"]["high"] or row["speed_up"]["median"] for row in rows))
