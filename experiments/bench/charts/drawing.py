"""Panels of charts as SVG, and sheets of panels, for a page (below each other if it is narrow) or as a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from textwrap import wrap
from typing import Any

from specdec.display.picture import PALETTE

WIDTH, SPACE = 430, 20  # of a panel, and between panels, in pixels
STYLE = """
.chart { color: #1f2328; --paper: #fff; font: 12px system-ui, sans-serif; }
.chart text { fill: currentColor; }
.chart .small { font-size: 11px; }
.chart .strong { font-weight: 600; }
.chart .title { font-size: 16px; }
.chart .grid { stroke: currentColor; opacity: .15; }
.chart .one { stroke: currentColor; stroke-width: 1.5; }
.chart .range { stroke: currentColor; fill: none; stroke-width: 1.2; }
@media (prefers-color-scheme: dark) { .chart { color: #e6edf3; --paper: #0d1117; } }
"""


Series = dict[str, dict[str, Any]]  # figures by name and value on the axis


@dataclass(frozen=True)
class Plot:
    """What a panel shows."""

    title: str
    key: str  # of the setting on the axis
    values: list[str]  # of that setting
    series: Series
    names: list[str]  # of the series of all panels, in the order of their colours
    most: float  # the end of the scale


@dataclass(frozen=True)
class Panel:
    """A drawing without its frame."""

    body: str
    height: float
    width: float = WIDTH

    def svg(self, attributes: str = "") -> str:
        size = f'width="{self.width:.0f}" height="{self.height:.0f}" viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        return f"<svg {attributes} {size}>{self.body}</svg>"


@dataclass(frozen=True)
class Sheet:
    """Panels of one scale, with a title, a legend and a note."""

    title: str
    panels: Sequence[Panel]
    note: str
    legend: dict[str, str] = field(default_factory=dict)  # colours by name

    def html(self) -> str:
        """For a page that has `STYLE`."""
        squares = (f'<span style="background:{colour}"></span>{escape(name)}' for name, colour in self.legend.items())
        legend = f'<p class="legend">{" ".join(f"<b>{each}</b>" for each in squares)}</p>' if self.legend else ""
        drawn = "".join(panel.svg('class="chart"') for panel in self.panels)
        title, note = escape(self.title), escape(self.note)
        return f'<figure aria-label="{title}">{legend}<div class="panels">{drawn}</div><p>{note}</p></figure>'

    def svg(self) -> str:
        """A file of its own with two panels in a row, readable on any background."""
        columns = min(2, len(self.panels))
        width = max(sum(panel.width + SPACE for panel in self.panels[:columns]), WIDTH + SPACE)
        parts = _paragraph(self.title, 22, 20, (width - SPACE) / 9, "strong title")
        x, y = SPACE / 2, 24.0 + 20 * len(parts)
        for name, colour in self.legend.items():
            if x + 24 + 7 * len(name) > width:
                x, y = SPACE / 2, y + 20
            parts += [f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{colour}"/>', text(x + 16, y, name)]
            x += 34 + 7 * len(name)
        y += 14 if self.legend else -12
        for i in range(0, len(self.panels), columns):
            row, x = self.panels[i : i + columns], SPACE / 2
            for panel in row:
                parts.append(panel.svg(f'x="{x}" y="{y}"'))
                x += panel.width + SPACE
            y += max(panel.height for panel in row) + SPACE
        note = _paragraph(self.note, y - 4, 16, (width - SPACE) / 5.6, "small")
        parts += note
        paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
        body = Panel(f"<style>{STYLE}</style>{paper}{''.join(parts)}", y - 8 + 16 * len(note), width)
        return body.svg(
            f'xmlns="http://www.w3.org/2000/svg" class="chart" role="img" aria-label="{escape(self.title)}"'
        )


@dataclass(frozen=True)
class Scale:
    """Pixels from values: 0 is at `start`, and the largest value at `end`."""

    most: float
    start: float
    end: float

    @property
    def ticks(self) -> list[float]:
        step = next(step for step in (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, self.most) if 5 * step >= self.most)
        return [i * step for i in range(int(self.most / step) + 1)]

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * value / self.most


def text(x: float, y: float, said: str, anchor: str = "start", kind: str = "") -> str:
    """A line of text; of the kinds of `STYLE`."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(said)}</text>'


def short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def colour(names: Sequence[str], name: str) -> str:
    return PALETTE[list(names).index(name) % len(PALETTE)]


def _paragraph(said: str, y: float, line: float, wide: float, kind: str) -> list[str]:
    return [text(SPACE / 2, y + line * i, each, kind=kind) for i, each in enumerate(wrap(said, int(wide)))]
