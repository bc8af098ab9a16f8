"""Speed-ups as bars, as lines or as a heat map, whichever fits what varies."""

from __future__ import annotations

from html import escape
from itertools import product
from math import log
from typing import Any

from experiments.bench.drawing import WIDTH, Panel, Scale, Sheet, colour, short, text
from experiments.bench.report import interval
from experiments.bench.sweep_table import label
from experiments.bench.swept import ALL, TASK, Point, Sweep, number, titled, words
from specdec.display.picture import PALETTE

BAR, GAP, LINES, COLUMNS = (
    13,
    9,
    6,
    6,
)  # a bar and the space between groups, in pixels; the most lines, and columns of a map
UNRESOLVED = "~: not told apart from no difference."
NOTE = f"Thin lines: 95 % intervals. {UNRESOLVED} tokens/step: tokens emitted per forward pass of the target."
DOTS = "Thin lines: 95 % intervals. Hollow: not told apart from no difference."
MAP = f"Blue is faster, orange slower. {UNRESOLVED} -: refused, or not measured."
Rows = dict[str, dict[str, dict[str, Any]]]  # figures by label and method


def picture(sweep: Sweep) -> Sheet:
    """Lines over a number with at least three values, bars by task, or else a map of all combinations."""
    base = next(iter(sweep.jobs[0]["figures"])).replace("_", " ")
    title = f"{sweep.shared.get('target', 'Sweep')}: speed-up over {base} decoding (1: as fast)"
    numeric = [i for i in range(len(sweep.axes)) if len(own := _values(sweep, i)) > 2 and all(map(number, own))]
    if numeric:
        x = max(numeric, key=lambda axis: len(_values(sweep, axis)))
        panels = _series(sweep, x)
        names = list(dict.fromkeys(name for series in panels.values() for name in series))
        if len(names) <= LINES:
            most = _most(point.figures for point in sweep.points)
            drawn = [_lines(setting, sweep, x, series, names, most) for setting, series in panels.items()]
            return Sheet(title, drawn, DOTS, {name: colour(names, name) for name in names})
    if TASK in sweep.axes or len(sweep.axes) < 2:
        return _by_last_axis(sweep, title)
    return Sheet(title, [_map(sweep)], MAP)


def bars(figures: dict[str, dict[str, Any]]) -> Sheet:
    """The methods of one result."""
    rows = {name: {"": row} for name, row in figures.items()}
    return Sheet(
        f"Speed-up over {next(iter(figures))} (1: as fast)", [_bars("", rows, [""], _most(figures.values()))], NOTE
    )


def _by_last_axis(sweep: Sweep, title: str) -> Sheet:
    """A panel for every setting, with a group of bars for every value of the last axis."""
    names = list(dict.fromkeys(point.method for point in sweep.points))
    panels: dict[str, Rows] = {}
    for point in sweep.points:
        setting = ", ".join(words(key, at) for key, at in zip(sweep.axes[:-1], point.at[:-1], strict=True))
        group = words(sweep.axes[-1], point.at[-1]) if sweep.axes else ""
        panels.setdefault(setting, {}).setdefault(group, {}).setdefault(point.method, point.figures)
    most = _most(point.figures for point in sweep.points)
    drawn = [_bars(setting, rows, names, most) for setting, rows in panels.items()]
    return Sheet(title, drawn, NOTE, {name: colour(names, name) for name in names})


def _bars(title: str, rows: Rows, names: list[str], most: float) -> Panel:
    """One panel: the speed-up and the acceptance length stand beside every bar."""
    labels = {name: short(name) for name in rows}
    scale, top = Scale(most, 12 + 6.4 * max(map(len, labels.values())), WIDTH - 126), 34
    heights = [BAR * len(of) + GAP for of in rows.values()]
    bottom = top + sum(heights)
    parts = [text(0, 14, title, 'class="strong"'), text(WIDTH - 74, 30, "speed-up", 'class="small" text-anchor="end"'),
             text(WIDTH, 30, "tokens/step", 'class="small" text-anchor="end"'), *_upright(scale, top, bottom)]  # fmt: skip
    y = float(top)
    for (name, of), height in zip(rows.items(), heights, strict=True):
        strong = ' class="strong"' if name == ALL else ""
        parts.append(text(scale.start - 8, y + height / 2 + 4, labels[name], f'text-anchor="end"{strong}'))
        for i, (method, row) in enumerate(of.items()):
            parts.append(_bar(scale, y + GAP / 2 + i * BAR, row, colour(names, method), f"{name} {method}"))
        y += height
    parts.append(text((scale.start + scale.end) / 2, bottom + 32, "speed-up", 'class="small" text-anchor="middle"'))
    return Panel("".join(parts), bottom + 38)


def _bar(scale: Scale, y: float, row: dict[str, Any], fill: str, title: str) -> str:
    speed, middle = row["speed_up"], y + BAR / 2
    width = scale(speed["median"]) - scale.start
    parts = [
        f'<rect x="{scale.start:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR - 2}" fill="{fill}" opacity=".85"/>'
    ]
    if speed["low"] is not None:
        low, high = scale(speed["low"]), scale(speed["high"])
        parts.append(f'<path class="range" d="M{low:.1f} {middle - 1:.1f}H{high:.1f}"/>')
    mark = "" if speed.get("resolved", True) else "~ "
    for x, said in ((WIDTH - 74, f"{mark}{speed['median']:.2f}"), (WIDTH, f"{row['acceptance_length']:.2f}")):
        parts.append(text(x, y + BAR - 3, said, 'class="small" text-anchor="end"'))
    return f"<g><title>{escape(f'{title}: {interval(speed, 2)}')}</title>{''.join(parts)}</g>"


def _upright(scale: Scale, top: float, bottom: float) -> list[str]:
    lines = [f'<path class="grid" d="M{scale(tick):.1f} {top}V{bottom}"/>' for tick in scale.ticks]
    said = [text(scale(tick), bottom + 15, f"{tick:g}", 'class="small" text-anchor="middle"') for tick in scale.ticks]
    return [*lines, *said, f'<path class="one" d="M{scale(1):.1f} {top}V{bottom}"/>']


def _series(sweep: Sweep, x: int) -> dict[str, dict[str, dict[str, Point]]]:
    """By panel and line, the points by their value on the axis. A line is a method, and a panel a setting of the other axes; of
    one method, a line is a setting.
    """
    several = len({point.method for point in sweep.points}) > 1
    found: dict[str, dict[str, dict[str, Point]]] = {}
    for point in sweep.points:
        told = (words(key, at) for i, (key, at) in enumerate(zip(sweep.axes, point.at, strict=True)) if i != x)
        setting = ", ".join(told)
        panel, line = (setting, point.method) if several else ("", setting or point.method)
        found.setdefault(panel, {}).setdefault(line, {}).setdefault(point.at[x], point)
    return found


def _lines(
    title: str, sweep: Sweep, x: int, series: dict[str, dict[str, Point]], names: list[str], most: float
) -> Panel:
    """The values of an axis stand at equal distances; points of one value stand beside each other."""
    scale, values, left = Scale(most, 230, 36), _values(sweep, x), 34
    step, parts = (WIDTH - left) / len(values), []
    for tick in scale.ticks:
        line = "one" if tick == 1 else "grid"
        parts.append(f'<path class="{line}" d="M{left} {scale(tick):.1f}H{WIDTH}"/>')
        parts.append(text(left - 6, scale(tick) + 4, f"{tick:g}", 'class="small" text-anchor="end"'))
    middles = {value: left + step * (i + 0.5) for i, value in enumerate(values)}
    for value, middle in middles.items():
        parts.append(text(middle, 248, value, 'class="small" text-anchor="middle"'))
    for i, (name, points) in enumerate(series.items()):
        aside = 8 * (i - (len(series) - 1) / 2)
        at = [(middles[value] + aside, point) for value, point in points.items()]
        path = "L".join(f"{place:.1f} {scale(point.figures['speed_up']['median']):.1f}" for place, point in at)
        stroke = colour(names, name)
        parts.append(f'<path d="M{path}" stroke="{stroke}" fill="none" stroke-width="2"/>')
        parts += [_dot(scale, place, point, stroke, label(sweep, point)) for place, point in at]
    parts += [text(0, 14, title, 'class="strong"'), text(0, 28, "speed-up", 'class="small"'),
              text((left + WIDTH) / 2, 266, titled(sweep.axes[x]), 'class="small" text-anchor="middle"')]  # fmt: skip
    return Panel("".join(parts), 272)


def _dot(scale: Scale, x: float, point: Point, fill: str, title: str) -> str:
    speed = point.figures["speed_up"]
    ends = (speed["low"], speed["high"]) if speed["low"] is not None else ()
    span = "V".join(f"{scale(end):.1f}" for end in ends)
    drawn = f'<path d="M{x:.1f} {span}" stroke="{fill}" stroke-width="1.2"/>' if span else ""
    middle = scale(speed["median"])
    filled = fill if speed.get("resolved", True) else "var(--paper)"
    said = escape(f"{title}: {interval(speed, 2)}")
    circle = f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="3.5" fill="{filled}" stroke="{fill}" stroke-width="1.5"/>'
    return f"<g><title>{said}</title>{drawn}{circle}</g>"


def _map(sweep: Sweep) -> Panel:
    """A row for every method, and for the first axes if there are too many columns otherwise."""
    first = len(sweep.axes) - 1
    while first > 0 and len({point.at[first - 1 :] for point in sweep.points}) <= COLUMNS:
        first -= 1
    cells = {((point.method, *point.at[:first]), point.at[first:]): point for point in reversed(sweep.points)}
    columns = list(product(*(_values(sweep, i) for i in range(first, len(sweep.axes)))))
    rows = list(dict.fromkeys((point.method, *point.at[:first]) for point in sweep.points))
    keys, left, wide, high = sweep.axes[first:], 134, 52, 24
    top = 16 * len(keys) + 8
    parts = [text(left - 8, 16 * i + 14, titled(key), 'class="small" text-anchor="end"') for i, key in enumerate(keys)]
    for j, at in enumerate(columns):
        for i, said in enumerate(at):
            parts.append(text(left + wide * (j + 0.5), 16 * i + 14, said, 'class="small" text-anchor="middle"'))
    strongest = max(abs(log(point.figures["speed_up"]["median"])) for point in sweep.points) or 1.0
    for i, row in enumerate(rows):
        named = ", ".join([row[0], *(words(key, said) for key, said in zip(sweep.axes, row[1:], strict=False))])
        parts.append(text(left - 8, top + high * i + 16, short(named), 'text-anchor="end"'))
        for j, at in enumerate(columns):
            box = (left + wide * j, top + high * i, wide - 2, high - 2)
            parts.append(_cell(cells.get((row, at)), box, strongest))
    return Panel("".join(parts), top + high * len(rows) + 4, left + wide * len(columns))


def _cell(point: Point | None, box: tuple[float, float, float, float], strongest: float) -> str:
    """The further from 1, the stronger the colour; nothing where the combination was refused."""
    x, y, width, height = box
    middle = text(x + width / 2, y + 15, "-", 'class="small" text-anchor="middle"')
    if point is None:
        return middle
    speed = point.figures["speed_up"]
    fill, strength = PALETTE[speed["median"] < 1], 0.8 * abs(log(speed["median"])) / strongest
    tile = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" opacity="{strength:.2f}"/>'
    said = interval({**speed, "n": 1}, 2)
    shown = text(x + width / 2, y + 15, said, 'class="small" text-anchor="middle"')
    return f"<g><title>{escape(f'{point.method}: {interval(speed, 2)}')}</title>{tile}{shown}</g>"


def _values(sweep: Sweep, axis: int) -> list[str]:
    return list(dict.fromkeys(point.at[axis] for point in sweep.points))


def _most(rows: Any) -> float:
    speeds = [row["speed_up"] for row in rows]
    return max(1.0, *(speed["high"] or speed["median"] for speed in speeds))
