"""Text with markdown tables, made to be read in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import zip_longest


def fitted(text: str, width: int = 100) -> str:
    """The text in lines of at most so many characters, as far as single words and cells allow it.

    Tables have aligned columns, their headers broken into lines. One that is too wide becomes several, one below the other,
    each with the first column.
    """
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    parts = text.split("\n\n")
    return "\n\n".join(_table(part, width) if part.startswith("| ") else wrapper.fill(part) for part in parts)


def _table(markdown: str, width: int) -> str:
    header, _, *body = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in markdown.splitlines())
    columns = list(zip(header, *body, strict=True))
    return "\n\n".join(_aligned(group) for group in _groups(columns, width))


def _groups(columns: list[tuple[str, ...]], width: int) -> Iterator[list[tuple[str, ...]]]:
    """The columns in groups that are no wider than that, each behind the first column."""
    first, *rest = columns
    group = [first]
    for column in rest:
        if len(group) > 1 and sum(_width(c) + 2 for c in [*group, column]) - 2 > width:
            yield group
            group = [first]
        group.append(column)
    yield group


def _width(column: tuple[str, ...]) -> int:
    header, *cells = column
    return max(map(len, [*header.split(), *cells]))


def _aligned(columns: list[tuple[str, ...]]) -> str:
    widths = [_width(column) for column in columns]
    headers = [textwrap.wrap(column[0], width) for column, width in zip(columns, widths, strict=True)]
    height = max(map(len, headers))
    above = zip_longest(*([""] * (height - len(lines)) + lines for lines in headers), fillvalue="")
    rows = [*above, ["-" * width for width in widths], *zip(*(column[1:] for column in columns), strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
