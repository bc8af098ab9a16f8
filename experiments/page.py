"""A folder of results as one page that needs nothing else, and as markdown.

    python experiments/page.py experiments/results outputs/results.html outputs/results.md
    python experiments/page.py outputs/sweep/smollm2 outputs/smollm2.html outputs/smollm2.md --pictures outputs/pictures

The jobs of a sweep, which are the files of one folder, are one picture and one table, which a click on a heading sorts; what
was refused is listed with the reasons. Every other JSON file with `figures` by method is shown with its speed-ups, its table
and where it comes from. The page asks for nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

from experiments.bench import sweep_table
from experiments.bench.charts import picture
from experiments.bench.charts.drawing import STYLE as CHARTS
from experiments.bench.report import COLUMNS, MARKED, cells, exceeding
from experiments.bench.report import markdown as as_markdown
from experiments.bench.swept import Sweep, sweep

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; font-size: 1.15rem; }
.wide { overflow: auto; max-height: 40rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; position: sticky; top: 0; background: Canvas; }
th:first-child, td:first-child, .words { text-align: left; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
table.about td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
.panels { display: flex; flex-wrap: wrap; gap: 1.5rem; overflow-x: auto; }
.legend b { font-weight: 400; white-space: nowrap; margin-right: 1rem; }
.legend span { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
svg { max-width: 100%; height: auto; }
"""
SORT = """
for (const table of document.querySelectorAll("table.sort")) {
  const heads = [...table.querySelectorAll("th")], body = table.tBodies[0];
  heads.forEach((head, i) => head.firstChild.onclick = () => {
    const sign = head.ariaSort === "descending" ? 1 : -1;
    const value = row => row.cells[i].textContent.replace(/^~ /, "");
    const order = (a, b) => {
      const [x, y] = [parseFloat(a), parseFloat(b)];
      if (isNaN(x) || isNaN(y)) return isNaN(x) && isNaN(y) ? sign * a.localeCompare(b) : isNaN(x) - isNaN(y);
      return sign * (x - y);
    };
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.ariaSort = sign < 0 ? "descending" : "ascending";
    body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
  });
}
"""
ABOUT = ("command", "commit", "dirty", "date", "cpu", "gpu", "versions", "prompts", "rounds", "options")
NEEDED = {"speed_up", "acceptance_length", "identical"}  # they tell figures of methods from others
Files = dict[str, Any]  # contents by name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the JSON files are, in any depth")
    parser.add_argument("page", type=Path, help="the HTML file to write")
    parser.add_argument("table", type=Path, help="the markdown file to write")
    parser.add_argument("--pictures", type=Path, help="a folder for the pictures of the sweeps, as SVG files")
    options = parser.parse_args()
    results, others = read(options.folder)
    files = {options.page: page(results, others), options.table: markdown(results, others)}
    if options.pictures:
        for folder, jobs in sweeps(results, others).items():
            name = f"{options.folder.resolve().name}/{folder}".removesuffix("/.").replace("/", "_")
            files[options.pictures / f"{name}.svg"] = picture.picture(jobs).svg()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        print(path)


def read(folder: Path) -> tuple[Files, Files]:
    """Results with figures of methods by file, in order of their dates; the other JSON files."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*.json")))
    # hidden: what is being written, see `experiments.bench.results.whole`
    seen = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    files = {str(name): json.loads((folder / name).read_text("utf-8")) for name in seen}
    if not files:
        raise SystemExit(f"{folder}: there is no JSON file in it.")
    results = [name for name, content in files.items() if _by_method(content)]
    ordered = sorted(results, key=lambda name: (files[name].get("date", ""), name))
    return {name: files[name] for name in ordered}, {name: files[name] for name in files if name not in results}


def sweeps(results: Files, others: Files) -> dict[str, Sweep]:
    """By folder, the jobs there, if any of them was measured."""
    found: dict[str, list[Any]] = {}
    for name, content in (results | others).items():
        if _is_job(content):
            found.setdefault(str(Path(name).parent), []).append(content)
    return {folder: sweep(jobs) for folder, jobs in found.items() if any("figures" in job for job in jobs)}


def markdown(results: Files, others: Files) -> str:
    """Every sweep, then all figures of other results in one table."""
    if not results:
        return "No file has figures of methods.\n"
    found = sweeps(results, others).values()
    parts = [part for jobs in found for part in (f"## {jobs}", sweep_table.text(jobs))]
    rows = [
        [name.removesuffix(".json"), *row]
        for name, content in results.items()
        if not _is_job(content)
        for row in _table(content)[1:]
    ]
    single = [as_markdown([["result", "method", *COLUMNS.values()], *rows]), MARKED] if rows else []
    refused = [said for said in _unread(others) if ": " in said]
    return "\n\n".join([*parts, *single, *refused]) + "\n"


def page(results: Files, others: Files) -> str:
    """The HTML page."""
    alone = {name: content for name, content in results.items() if not _is_job(content)}
    links = "".join(f'<li><a href="#{escape(name)}">{escape(name)}</a></li>' for name in alone)
    found = "".join(_sweep(*item) for item in sweeps(results, others).items())
    sections = "".join(_section(*item) for item in alone.items())
    rest = "".join(f"<li>{escape(said)}</li>" for said in _unread(others))
    unread = f"<h2>Without figures of methods</h2><ul>{rest}</ul>" if rest else ""
    body = f"<h1>Results</h1>{found}{f'<ul>{links}</ul>' * bool(links)}{sections}{unread}<script>{SORT}</script>"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Results</title>'
    style = f"<style>{CHARTS}{STYLE}.chart {{ color: inherit; --paper: Canvas; }}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}{style}</head><body>{body}</body></html>\n'


def chart(figures: dict[str, dict[str, Any]]) -> str:
    """SVG: the speed-ups of one result as bars with their intervals, and a line at 1."""
    return picture.of_methods(figures).svg()


def _sweep(folder: str, jobs: Sweep) -> str:
    title = str(jobs) if folder == "." else f"{folder}: {jobs}"
    reasons = "".join(f"<li>{escape(said)}</li>" for said in sweep_table.refusals(jobs))
    refused = f"<h3>Refused or failed</h3><ul>{reasons}</ul>" if reasons else ""
    notes = "".join(f"<p>{escape(said)}</p>" for said in sweep_table.notes(jobs))
    commands = "".join(f"<li><code>{escape(job['command'])}</code></li>" for job in jobs.jobs)
    source = f"<details><summary>where it comes from</summary><ul>{commands}</ul></details>"
    shown = f"{picture.picture(jobs).html()}{_html(sweep_table.table(jobs))}{notes}{refused}{source}"
    return f"<h2>{escape(title)}</h2><p><code>{escape(sweep_table.shared(jobs))}</code></p>{shown}"


def _section(name: str, content: dict[str, Any]) -> str:
    about = {key: content[key] for key in ABOUT if content.get(key) is not None}
    command = f"<p><code>{escape(about.pop('command', ''))}</code></p>"
    facts = "".join(
        f"<tr><td>{key}</td><td><code>{escape(_said(value))}</code></td></tr>" for key, value in about.items()
    )
    details = f'<details><summary>where it comes from</summary><table class="about">{facts}</table></details>'
    figures = content["figures"]
    notes = "".join(f"<p>{escape(said)}</p>" for said in (MARKED, *exceeding(figures.values())))
    shown = f"{picture.of_methods(figures).html()}{_html(_table(content))}{notes}"
    return f'<h2 id="{escape(name)}">{escape(name)}</h2>{command}{shown}{details}'


def _table(content: dict[str, Any]) -> list[list[str]]:
    """The cells of the report, method by method, and of one that could not run why; the first row is the header."""
    head = ["method", *COLUMNS.values()]
    lacking = [[name, why, *["-"] * (len(head) - 2)] for name, why in content.get("absent", {}).items()]
    return [head, *([name, *cells(row, *COLUMNS)] for name, row in content["figures"].items()), *lacking]


def _html(rows: list[list[str]]) -> str:
    """A table; the first row is its header."""
    kinds = [' class="words"' * cell[:1].isalpha() for cell in rows[1]]
    titles = "".join(
        f"<th{kind}><button>{escape(cell)}</button></th>" for kind, cell in zip(kinds, rows[0], strict=True)
    )
    lines = "".join(f"<tr>{''.join(map(_cell, kinds, row))}</tr>" for row in rows[1:])
    table = f'<table class="sort"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>'
    return f'<div class="wide" tabindex="0">{table}</div>'


def _cell(kind: str, cell: str) -> str:
    return f"<td{kind}>{escape(cell)}</td>"


def _unread(others: Files) -> list[str]:
    """Names of files that are no jobs, with the reason if they are refusals."""
    alone = {name: content for name, content in others.items() if not _is_job(content)}
    return [
        f"{name}: {content['refused']}" if isinstance(content, dict) and "refused" in content else name
        for name, content in alone.items()
    ]


def _is_job(content: Any) -> bool:
    return isinstance(content, dict) and "settings" in content and bool({"figures", "refused", "failed"} & set(content))


def _by_method(content: Any) -> bool:
    """Whether its figures are those of `experiments.bench.report.figures`."""
    figures = content.get("figures") if isinstance(content, dict) else None
    rows = list(figures.values()) if isinstance(figures, dict) else []
    return bool(rows) and all(isinstance(row, dict) and set(row) >= NEEDED for row in rows)


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    main()
