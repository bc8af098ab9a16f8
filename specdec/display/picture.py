"""Coloured text, for terminals and for notebooks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

DEPTHS = 6  # drafted tokens that are deeper have the last shade
BLUE, ORANGE, GREEN = "#1e6ef0", "#e67800", "#00a03c"  # accepted drafts, recovered and bonus tokens
GREY = "#8a8f98"
PALETTE = (BLUE, ORANGE, GREEN, "#9b59d0", "#c94f6d", GREY)  # of charts


class Style(NamedTuple):
    """How a piece of text is set off."""

    ansi: str  # parameters of the escape sequence
    css: str  # backgrounds are translucent, so that text is readable on light and dark pages


def _tint(colour: str, alpha: float) -> str:
    red, green, blue = bytes.fromhex(colour[1:])
    return f"background:rgba({red},{green},{blue},{alpha:.2f})"


PLAIN = Style("", "")
RECOVERED = Style("30;48;5;215", f"{_tint(ORANGE, 0.45)};border-bottom:2px dotted")
BONUS = Style("30;48;5;120", f"{_tint(GREEN, 0.40)};border-bottom:2px solid")
PATH = Style("1;32", f"font-weight:bold;{_tint(GREEN, 0.25)}")
FAINT = Style("2", "opacity:.65")
DRAFTED = [
    Style(f"30;48;5;{colour}", _tint(BLUE, 0.15 + 0.09 * depth))
    for depth, colour in zip(range(1, DEPTHS + 1), (195, 159, 153, 117, 111, 75), strict=True)
]


class Span(NamedTuple):
    text: str
    style: Style = PLAIN
    title: str = ""  # what a notebook shows when the mouse is on the span


@dataclass(frozen=True, repr=False)
class Picture:
    """Coloured text. `print` shows it in a terminal (without colours if NO_COLOR is set), a notebook by itself."""

    spans: list[Span]

    def __str__(self) -> str:
        if os.environ.get("NO_COLOR"):
            return "".join(span.text for span in self.spans)
        return "".join(map(_ansi, self.spans))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f'<pre style="white-space:pre-wrap;line-height:1.6">{"".join(map(_html, self.spans))}</pre>'


def _ansi(span: Span) -> str:
    if span.style.ansi == "":
        return span.text
    lines = span.text.split("\n")  # colours must end before a line break, or they fill the rest of the line
    return "\n".join(f"\x1b[{span.style.ansi}m{line}\x1b[0m" if line else "" for line in lines)


def _html(span: Span) -> str:
    attributes = {"style": span.style.css, "title": span.title}
    given = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items() if value)
    return f"<span{given}>{escape(span.text)}</span>" if given else escape(span.text)
