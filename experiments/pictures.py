"""The README's picture: an answer of SmolLM2, coloured by who wrote each token.

    python experiments/pictures.py notebooks/pictures/authors.svg

The model is downloaded once (93 MB). Decoding is greedy, so the same machine draws the same picture again. The chart beside it
is drawn by `experiments/page.py ... --pictures notebooks/pictures`, from a sweep.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

import specdec
from specdec.display import Picture
from specdec.display.picture import Span
from specdec.drafters import SuffixDrafter

QUESTION = "Write a Python class Stack with push, pop and peek."
LEFT, LINE, LETTER, SIZE = 12, 21, 8.4, 14  # pixels: margin, height of a line, width of a letter, size of the font
STYLE = """<style>
text { font: 14px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #1f2328; white-space: pre }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }
</style>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the SVG file to write")
    parser.add_argument("--tokens", type=int, default=143, help="most new tokens")
    options = parser.parse_args()
    chat = specdec.demo.smollm2.load()
    question = [{"role": "user", "content": QUESTION}]
    out = specdec.generate(
        chat.target, question, SuffixDrafter(), tokenizer=chat.tokenizer, max_new_tokens=options.tokens
    )
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(svg(specdec.display.text(out)), "utf-8")
    print(options.file)


def svg(picture: Picture) -> str:
    """The picture as SVG, on no background; its letters are dark on light pages, and light on dark ones."""
    pieces = list(_placed(picture.spans))
    columns, lines = max(end for _, _, end, _ in pieces), 1 + max(line for line, *_ in pieces)
    width, height = 2 * LEFT + LETTER * columns, LEFT + LINE * lines
    body = "\n".join(_drawn(*piece) for piece in pieces)
    size = f'viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}"'
    label = 'xml:space="preserve" role="img" aria-label="text coloured by who wrote each token"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>\n{STYLE}\n{body}\n</svg>\n'


def _placed(spans: list[Span]) -> Iterator[tuple[int, int, int, Span]]:
    """(line, first column, column behind it, piece): spans are cut where lines end."""
    line = column = 0
    for span in spans:
        for i, text in enumerate(span.text.split("\n")):
            if i:
                line, column = line + 1, 0
            if text:
                yield line, column, column + len(text), span._replace(text=text)
                column += len(text)


def _drawn(line: int, start: int, end: int, span: Span) -> str:
    x, y, width = LEFT + LETTER * start, LEFT + LINE * line, LETTER * (end - start)
    coloured = "background" in span.style.css
    box = (
        f'<rect x="{x:.1f}" y="{y - 2}" width="{width:.1f}" height="{LINE - 2}" {_fill(span.style.css)}/>'
        if coloured
        else ""
    )
    words = f'<text x="{x:.1f}" y="{y + SIZE - 1}" textLength="{width:.1f}">{escape(span.text)}</text>'
    return box + (words if span.text.strip() else "")


def _fill(css: str) -> str:
    """The background colour of a style, rgba(red,green,blue,opacity), as SVG writes it."""
    red, green, blue, opacity = re.findall(r"[\d.]+", css.partition("background:rgba")[2])[:4]
    return f'fill="rgb({red},{green},{blue})" fill-opacity="{float(opacity):.2f}"'


if __name__ == "__main__":
    main()
