"""A folder of results as one page that needs nothing else, and as one markdown table.

    python experiments/page.py experiments/results outputs/results.html outputs/results.md
    python experiments/page.py outputs/sweep/smollm2 outputs/smollm2.html outputs/smollm2.md --pictures outputs/pictures

Every JSON file with `figures` by method is shown with its table, its speed-ups and where it comes from; other files are
listed, with the reason if they are refusals. Before them, jobs of a sweep over tasks are shown together: a table and a picture
with a row for every task. The page has no scripts and asks for nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
from html import escape
from pathlib import Path
from typing import Any

from experiments.bench import by_task, report
from experiments.bench.report import COLUMNS, cells

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #2f7de1; --faint: #8889; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; font-size: 1.15rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
table.about td { text-align: left; white-space: normal; }
code { overflow-wrap: anywhere; }
details, .faint { opacity: .75; }
svg { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
svg text { fill: currentColor; font: 13px system-ui, sans-serif; }
"""
ABOUT = ("command", "commit", "dirty", "date", "cpu", "gpu", "versions", "prompts", "rounds", "options")
NEEDED = {"speed_up", "acceptance_length", "identical"}  # they tell figures of methods from others
LABEL, WIDTH, ROW = 210, 420, 26  # of the chart, in pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the JSON files are, in any depth")
    parser.add_argument("page", type=Path, help="the HTML file to write")
    parser.add_argument("table", type=Path, help="the markdown file to write")
    parser.add_argument("--pictures", type=Path, help="a folder for the pictures of sweeps over tasks, as SVG files")
    options = parser.parse_args()
    results, others = read(options.folder)
    files = {options.page: page(results, others), options.table: markdown(results, others)}
    if options.pictures:
        sweeps = by_task.by_setting(list(results.values()))
        drawn = {re.sub(r"\W+", "_", setting): by_task.picture(setting, rows) for setting, rows in sweeps.items()}
        files |= {options.pictures / f"{name}.svg": text for name, text in drawn.items()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        print(path)


def read(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Results with figures of methods by file, in order of their dates; the other JSON files, with why they have none if they
    say so.
    """
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*.json")))
    # hidden: what is being written, see `experiments.bench.results.whole`
    seen = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    files = {str(name): json.loads((folder / name).read_text("utf-8")) for name in seen}
    if not files:
        raise SystemExit(f"{folder}: there is no JSON file in it.")
    results = {name: {**content, "figures": _rows(content)} for name, content in files.items() if _by_method(content)}
    ordered = sorted(results, key=lambda name: (results[name].get("date", ""), name))
    return {name: results[name] for name in ordered}, {name: _why(files[name]) for name in files if name not in results}


def _why(content: Any) -> str:
    return content.get("refused", "") if isinstance(content, dict) else ""


class _Row(dict):
    """Figures of a method; None where a file is older than a figure."""

    def __missing__(self, key: str) -> None:
        return None


def _rows(content: dict[str, Any]) -> dict[str, Any]:
    return {name: _Row(row) for name, row in content["figures"].items()}


def markdown(results: dict[str, dict[str, Any]], others: dict[str, str]) -> str:
    """Sweeps by task, what was refused, then all figures in one table."""
    if not results:
        return "No file has figures of methods.\n"
    parts = []
    for setting, rows in by_task.by_setting(list(results.values())).items():
        parts += [f"## {setting}", *map(report.markdown, by_task.tables(rows)), by_task.lowest(rows)]
    parts += [f"{name}: {why}" for name, why in others.items() if why]
    lines = [[name.removesuffix(".json"), *row] for name, content in results.items() for row in _table(content)]
    return "\n\n".join([*parts, report.markdown([["result", "method", *COLUMNS.values()], *lines])]) + "\n"


def _table(content: dict[str, Any]) -> list[list[str]]:
    """The cells of the report, method by method; of one that could not run, why."""
    lacking = [[name, why, *["-"] * (len(COLUMNS) - 1)] for name, why in content.get("absent", {}).items()]
    return [*([name, *cells(row, *COLUMNS)] for name, row in content["figures"].items()), *lacking]


def page(results: dict[str, dict[str, Any]], others: dict[str, str]) -> str:
    """The HTML page."""
    listed = "".join(f"<li>{escape(f'{name}: {why}' if why else name)}</li>" for name, why in others.items())
    rest = f"<h2>Without figures of methods</h2><ul>{listed}</ul>" if others else ""
    links = "".join(f'<li><a href="#{escape(name)}">{escape(name)}</a></li>' for name in results)
    sweeps = "".join(_sweep(*item) for item in by_task.by_setting(list(results.values())).items())
    sections = "".join(_section(*item) for item in results.items())
    body = f"<h1>Results</h1>{sweeps}<ul>{links}</ul>{sections}{rest}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Results</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n'


def _by_method(content: Any) -> bool:
    """Whether its figures are those of `experiments.bench.report.figures`."""
    figures = content.get("figures") if isinstance(content, dict) else None
    rows = list(figures.values()) if isinstance(figures, dict) else []
    return bool(rows) and all(isinstance(row, dict) and set(row) >= NEEDED for row in rows)


def _sweep(setting: str, rows: by_task.Rows) -> str:
    shown = "".join(map(_html, by_task.tables(rows)))
    return f"<h2>{escape(setting)}</h2>{by_task.picture(setting, rows)}{shown}<p>{escape(by_task.lowest(rows))}</p>"


def _section(name: str, content: dict[str, Any]) -> str:
    about = {key: content[key] for key in ABOUT if content.get(key) is not None}
    command = f"<p><code>{escape(about.pop('command', ''))}</code></p>"
    facts = "".join(
        f"<tr><td>{key}</td><td><code>{escape(_said(value))}</code></td></tr>" for key, value in about.items()
    )
    details = f'<details><summary>where it comes from</summary><table class="about">{facts}</table></details>'
    figures = content["figures"]
    return f'<h2 id="{escape(name)}">{escape(name)}</h2>{command}{chart(figures)}{_html_table(content)}{details}'


def _html_table(content: dict[str, Any]) -> str:
    return _html([["method", *COLUMNS.values()], *_table(content)])


def _html(rows: list[list[str]]) -> str:
    """A table; the first row is its header."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def chart(figures: dict[str, dict[str, Any]]) -> str:
    """Speed-ups as bars with their intervals, and a line at 1."""
    speeds = {name: row["speed_up"] for name, row in figures.items()}
    scale = WIDTH / max(1.0, *(speed["high"] or speed["median"] for speed in speeds.values()))
    bars = "".join(_bar(i, name, speed, scale) for i, (name, speed) in enumerate(speeds.items()))
    one, height = LABEL + scale, ROW * len(speeds) + 4
    path = f'd="M{one:.1f} 0v{height}" stroke="currentColor" stroke-dasharray="3 3" opacity=".6"'
    size = f'viewBox="0 0 {LABEL + WIDTH + 60} {height}" width="{LABEL + WIDTH + 60}"'
    return (
        f'<svg {size} role="img" aria-label="speed-up of every method, with 95 % intervals">{bars}<path {path}/></svg>'
    )


def _bar(i: int, name: str, speed: dict[str, Any], scale: float) -> str:
    y, end = i * ROW + 4, LABEL + scale * speed["median"]
    shown = name if len(name) <= 30 else f"{name[:29]}…"
    parts = [
        f'<text x="{LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(shown)}<title>{escape(name)}</title></text>',
        f'<rect x="{LABEL}" y="{y}" width="{scale * speed["median"]:.1f}" height="18" fill="var(--bar)" opacity=".75"/>',
    ]
    if speed["low"] is not None:
        low, high, middle = LABEL + scale * speed["low"], LABEL + scale * speed["high"], y + 9
        parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {y + 4}v10M{high:.1f} {y + 4}v10" '
                     'stroke="currentColor" fill="none" stroke-width="1.5"/>')  # fmt: skip
        end = max(end, high)
    return "".join([*parts, f'<text x="{end + 6:.1f}" y="{y + 14}">{speed["median"]:.2f}</text>'])


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    main()
