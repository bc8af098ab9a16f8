"""The page of `experiments.studies.batching`: a table of all cases, and the conditions they were measured under."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.bench.report import markdown

TODAY, SLOTS, THEIRS = "one after another", "slots", "generate_batch"
HEAD = ["", "rows running", "steps", "tokens/s of processor time", "speed, processor time", "speed, wall time",
        "over `generate_batch`: processor", "wall", "same texts"]  # fmt: skip


def speed(way: dict[str, Any], clock: str) -> float:
    """Tokens per second."""
    return way["tokens"] / way["seconds"][clock]


def ratios(rows: Sequence[dict[str, Any]], way: str, base: str, clock: str) -> list[float]:
    """Speeds of one way over another's, round by round."""
    return [speed(row["ways"][way], clock) / speed(row["ways"][base], clock) for row in rows]


def line(row: dict[str, Any]) -> str:
    """What a round says of a case."""
    shown = [f"{name} {speed(way, 'process'):.0f}" for name, way in row["ways"].items()]
    ratio = ratios([row], SLOTS, TODAY, "process")[0]
    return (
        f"{row['case']}, seed {row['seed']}: tokens/s {', '.join(shown)}; {ratio:.2f} times; parted {row['partings']}"
    )


def page(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["case"] for row in rows))
    table = markdown([HEAD, *(cells([row for row in rows if row["case"] == name]) for name in names)])
    rounds = len({row["seed"] for row in rows})
    about = (
        f"Demo pair, float32, one thread, temperature 0.8, stop tokens at the ends of paragraphs, up to "
        f"{result['options']['tokens']} new tokens of each prompt; {rounds} rounds, each with a seed of its own. From batches "
        "one after another to rows that are refilled (-> and speed), and these over transformers' `generate_batch`. Ratios are "
        "medians over rounds, with the least and the greatest. Reading prompts is counted. `generate_batch` runs with sdpa, no "
        "warm-up and a cache for the requests at work: its own choice of sizes makes it several times slower here."
    )
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    commit = f"Commit {result['commit']}{' with changes' if result['dirty'] else ''}"
    source = f"{commit}, {result['cpu']}, {versions}, {result['date'][:10]}."
    parts = [f"# Rows that are refilled\n\n    {result['command']}", about, table, parted(rows)]
    return "\n\n".join([*parts, shared(result["shared"]), gaps(result["gaps"]), source]) + "\n"


def cells(rows: list[dict[str, Any]]) -> list[str]:
    """A row of the table, from all rounds of a case."""
    before, after = ([row["ways"][way] for row in rows] for way in (TODAY, SLOTS))

    def change(key: str, digits: int) -> str:
        return " -> ".join(f"{np.mean([way[key] for way in some]):.{digits}f}" for some in (before, after))

    speeds = " -> ".join(f"{np.median([speed(way, 'process') for way in some]):.0f}" for some in (before, after))
    over = [spread(ratios(rows, SLOTS, TODAY, clock)) for clock in ("process", "wall")]
    theirs = ["-", "-"]
    if THEIRS in rows[0]["ways"]:
        theirs = [spread(ratios(rows, SLOTS, THEIRS, clock)) for clock in ("process", "wall")]
    prompts = int(rows[0]["case"].split(", ")[1].split()[0])
    same = f"{sum(prompts - len(row['partings']) for row in rows)}/{prompts * len(rows)}"
    return [rows[0]["case"], change("running", 2), change("steps", 0), speeds, *over, *theirs, same]


def spread(values: Sequence[float]) -> str:
    """Median, least and greatest."""
    return f"{np.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def parted(rows: list[dict[str, Any]]) -> str:
    """Every text that is not the same in both ways, and whether it is in float64."""
    found = [
        f"- {row['case']}, seed {row['seed']}: text {text} after {place} tokens; in float64 "
        + ("it parts too" if text in row["partings_float64"] else "it is the same: rounding")
        for row in rows
        for text, place in row["partings"].items()
    ]
    return "\n".join(["Texts that part:", "", *found]) if found else "No text parts."


def shared(found: dict[str, Any]) -> str:
    """What prompts with one beginning cost, read by each and read once."""
    head = [
        "",
        "tokens read",
        "tokens copied",
        "seconds of processor time",
        "of these, until the first step",
        "tokens/s",
    ]
    rows = [
        [
            name,
            *(f"{row[key]}" for key in ("read", "copied")),
            *(f"{row[key]:.2f}" for key in ("process", "prefill")),
            f"{row['tokens'] / row['process']:.0f}",
        ]
        for name, row in found["ways"].items()
    ]
    return (
        f"## Shared beginnings\n\n{found['about']} Same texts: {found['same']} of {found['prompts']}.\n\n"
        f"{markdown([head, *rows])}"
    )


def gaps(found: dict[str, Any]) -> str:
    """How long texts at work wait for a long newcomer."""
    head = ["", "steps", "median step, ms", "longest gap, ms", "steps while it was read"]
    rows = [
        [name, str(row["steps"]), f"{1e3 * row['median']:.1f}", f"{1e3 * row['longest']:.1f}", str(row["reading"])]
        for name, row in found["ways"].items()
    ]
    return f"## One long newcomer\n\n{found['about']}\n\n{markdown([head, *rows])}"
