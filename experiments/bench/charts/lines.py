"""A panel of lines."""

from __future__ import annotations

from html import escape
from typing import Any

from experiments.bench.charts.drawing import WIDTH, Panel, Plot, Scale, colour, text
from experiments.bench.report import interval
from experiments.bench.swept import titled, words

LEFT, TOP, BOTTOM, ASIDE = 34, 36, 230, 8  # of the plot, and between points of one value, in pixels


def lines(plot: Plot) -> Panel:
    """Speed-ups over the values of a number, which stand at equal distances; points of one value stand beside each other."""
    scale, step = Scale(plot.most, BOTTOM, TOP), (WIDTH - LEFT) / len(plot.values)
    middles = {value: LEFT + step * (i + 0.5) for i, value in enumerate(plot.values)}
    parts = _frame(plot.title, titled(plot.key), scale, middles)
    for i, (name, of) in enumerate(plot.series.items()):
        stroke, aside = colour(plot.names, name), ASIDE * (i - (len(plot.series) - 1) / 2)
        at = {value: (middles[value] + aside, scale(row["speed_up"]["median"])) for value, row in of.items()}
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at.values())
        parts.append(f'<path d="M{path}" stroke="{stroke}" fill="none" stroke-width="2"/>')
        for value, row in of.items():
            said = f"{name}, {words(plot.key, value)}: {interval(row['speed_up'], 2)}"
            dot = _dot(scale, *at[value], row["speed_up"], stroke)
            parts.append(f"<g><title>{escape(said)}</title>{dot}</g>")
    return Panel("".join(parts), BOTTOM + 42)


def _dot(scale: Scale, x: float, y: float, speed: dict[str, Any], stroke: str) -> str:
    fill = stroke if speed.get("resolved", True) else "var(--paper)"
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'
    if speed["low"] is None:
        return dot
    span = f"M{x:.1f} {scale(speed['low']):.1f}V{scale(speed['high']):.1f}"
    return f'<path d="{span}" stroke="{stroke}" stroke-width="1.2"/>{dot}'


def _frame(title: str, axis: str, scale: Scale, middles: dict[str, float]) -> list[str]:
    ticks = [(scale(tick), tick) for tick in scale.ticks]
    return [
        text(0, 14, title, kind="strong"),
        text(0, 28, "speed-up", kind="small"),
        *(f'<path class="{"one" if tick == 1 else "grid"}" d="M{LEFT} {y:.1f}H{WIDTH}"/>' for y, tick in ticks),
        *(text(LEFT - 6, y + 4, f"{tick:g}", "end", "small") for y, tick in ticks),
        *(text(x, BOTTOM + 18, value, "middle", "small") for value, x in middles.items()),
        text((LEFT + WIDTH) / 2, BOTTOM + 36, axis, "middle", "small"),
    ]
