"""A panel of bars."""

from __future__ import annotations

from html import escape
from typing import Any

from experiments.bench.charts.drawing import WIDTH, Panel, Plot, Scale, colour, short, text
from experiments.bench.report import interval
from experiments.bench.swept import ALL, words

BAR, GAP, TOP = 13, 9, 34  # a bar, the space between groups, and the space above them, in pixels
FIRST, SECOND = WIDTH - 74, WIDTH  # right edges of the columns of numbers


def bars(plot: Plot) -> Panel:
    """A group of bars for every value: speed-ups from 0, with a line at 1; beside each its number and the acceptance length."""
    labels = {value: short(words(plot.key, value)) for value in plot.values}
    scale = Scale(plot.most, 12 + 7 * max(map(len, labels.values())), WIDTH - 126)
    parts, y = [], float(TOP)
    for value, label in labels.items():
        drawn = [name for name, of in plot.series.items() if value in of]
        if not drawn:
            continue
        for i, name in enumerate(drawn):
            said = f"{name}, {label}".removeprefix(", ")
            at, row = y + GAP / 2 + i * BAR, plot.series[name][value]
            parts.append(_bar(scale, at, row, colour(plot.names, name), said))
        height = BAR * len(drawn) + GAP
        kind = "strong" if value == ALL else ""
        parts.append(text(scale.start - 8, y + height / 2 + 4, label, "end", kind))
        y += height
    return Panel("".join([*_frame(plot.title, scale, y), *parts]), y + 38)


def _bar(scale: Scale, y: float, row: dict[str, Any], fill: str, title: str) -> str:
    speed, width = row["speed_up"], scale(row["speed_up"]["median"]) - scale.start
    size = f'x="{scale.start:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR - 2}"'
    parts = [f'<rect {size} fill="{fill}" opacity=".85"/>']
    if speed["low"] is not None:
        low, high = scale(speed["low"]), scale(speed["high"])
        parts.append(f'<path class="range" d="M{low:.1f} {y + BAR / 2 - 1:.1f}H{high:.1f}"/>')
    parts.append(text(FIRST, y + BAR - 3, interval({**speed, "n": 1}, 2), "end", "small"))
    parts.append(text(SECOND, y + BAR - 3, f"{row['acceptance_length']:.2f}", "end", "small"))
    return f"<g><title>{escape(f'{title}: {interval(speed, 2)}')}</title>{''.join(parts)}</g>"


def _frame(title: str, scale: Scale, bottom: float) -> list[str]:
    ticks = [(scale(tick), f"{tick:g}") for tick in scale.ticks]
    return [
        text(0, 14, title, kind="strong"),
        text(FIRST, TOP - 4, "speed-up", "end", "small"),
        text(SECOND, TOP - 4, "tokens/step", "end", "small"),
        *(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>' for x, _ in ticks),
        *(text(x, bottom + 15, said, "middle", "small") for x, said in ticks),
        f'<path class="one" d="M{scale(1):.1f} {TOP}V{bottom}"/>',
        text((scale.start + scale.end) / 2, bottom + 32, "speed-up", "middle", "small"),
    ]
