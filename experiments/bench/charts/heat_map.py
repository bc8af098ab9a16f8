"""A panel that is a map of all combinations."""

from __future__ import annotations

from html import escape
from itertools import product
from math import log

from experiments.bench.charts.drawing import Panel, short, text
from experiments.bench.report import interval
from experiments.bench.sweep_table import label
from experiments.bench.swept import Point, Sweep, titled, words
from specdec.display.picture import BLUE, ORANGE

COLUMNS = 6  # at most, where the last axis alone has no more
# space for labels, size of a cell, and height of a line of the head, in pixels
LEFT, WIDE, HIGH, LINE = 134, 52, 24, 16


def heat_map(sweep: Sweep) -> Panel:
    """Speed-ups with a row for every method, and as many of the last axes in the columns as have room; the others are in the
    rows. The further from 1, the stronger the colour.
    """
    first = len(sweep.axes) - 1
    while first > 0 and len({point.at[first - 1 :] for point in sweep.points}) <= COLUMNS:
        first -= 1
    points = {(point.method, *point.at): point for point in reversed(sweep.points)}
    rows = list(dict.fromkeys((point.method, *point.at[:first]) for point in sweep.points))
    columns = list(product(*(sweep.values(i) for i in range(first, len(sweep.axes)))))
    strongest = max(abs(log(point.figures["speed_up"]["median"])) for point in sweep.points) or 1.0
    top = LINE * (len(sweep.axes) - first) + 8
    parts = _head(sweep.axes[first:], columns)
    for i, row in enumerate(rows):
        said = ", ".join([row[0], *(words(key, at) for key, at in zip(sweep.axes[:first], row[1:], strict=True))])
        parts.append(text(LEFT - 8, top + HIGH * i + 16, short(said), "end"))
        for j, column in enumerate(columns):
            point = points.get((*row, *column))
            tile = _tile(point, LEFT + WIDE * j, top + HIGH * i, strongest)
            title = "" if point is None else f"{label(sweep, point)}: {interval(point.figures['speed_up'], 2)}"
            parts.append(f"<g><title>{escape(title)}</title>{tile}</g>")
    return Panel("".join(parts), top + HIGH * len(rows) + 4, LEFT + WIDE * len(columns))


def _head(keys: tuple[str, ...], columns: list[tuple[str, ...]]) -> list[str]:
    titles = [text(LEFT - 8, LINE * i + 14, titled(key), "end", "small") for i, key in enumerate(keys)]
    return titles + [
        text(LEFT + WIDE * (j + 0.5), LINE * i + 14, said, "middle", "small")
        for j, column in enumerate(columns)
        for i, said in enumerate(column)
    ]


def _tile(point: Point | None, x: float, y: float, strongest: float) -> str:
    if point is None:
        return text(x + WIDE / 2, y + 15, "-", "middle", "small")
    speed = point.figures["speed_up"]
    fill, strength = ORANGE if speed["median"] < 1 else BLUE, 0.8 * abs(log(speed["median"])) / strongest
    box = f'<rect x="{x}" y="{y}" width="{WIDE - 2}" height="{HIGH - 2}" fill="{fill}" opacity="{strength:.2f}"/>'
    return box + text(x + WIDE / 2, y + 15, interval({**speed, "n": 1}, 2), "middle", "small")
