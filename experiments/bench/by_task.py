"""Results of sweeps over tasks, as tables and a picture with a row for every task."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np

from experiments.bench.measure import AGAIN
from experiments.bench.report import MARKED, interval, median, resolved

ALL = "all tasks"
LABEL, WIDTH, BAR, GAP = 150, 520, 13, 12  # of the picture, in pixels
COLOURS = ("#8a8f98", "#2f7de1", "#e0822f", "#3a9d5d", "#a05bd0", "#c94f6d", "#b09a1f")
WORDED = ("target", "dtype", "batch", "sampling", "task", "rule")  # said in other words
NAMED = ("methods", "drafter", "tree")  # said with a method's name
Rows = dict[str, dict[str, dict[str, Any]]]  # figures by task, then method


def by_setting(results: list[dict[str, Any]]) -> dict[str, Rows]:
    """The jobs that are of one task each, by what they have in common; a job of further methods adds these to its task.

    Where all tasks of a setting measured a method, `ALL` has its speed-up over them all.
    """
    found: dict[str, Rows] = {}
    speeds: dict[str, dict[str, dict[str, np.ndarray]]] = {}  # ratios [round, prompt]
    for result in results:
        tasks = result["options"]["task"].get("tasks") or () if "settings" in result else ()
        if len(tasks) == 1:
            setting, [task] = _setting(result), tasks
            of = found.setdefault(setting, {}).setdefault(task, {})
            for name, row in _named(result).items():
                of.setdefault(name, row)
            speeds.setdefault(setting, {}).setdefault(task, {}).update(_ratios(result))
    for setting, rows in found.items():
        rows[ALL] = _over_all(list(rows.values()), list(speeds[setting].values()))
    return found


def tables(rows: Rows) -> list[list[list[str]]]:
    """Of one setting: speed-ups, acceptance, and greedy texts that are transformers' own. The first row of each is its head."""
    found = [
        _table("speed-up (95 % CI)", rows, lambda row: interval(row["speed_up"], 2)),
        _table("acceptance length; rate of the 1st, 2nd, 3rd drafted token", rows, _acceptance),
    ]
    if any(row["identical"] is not None for of in rows.values() for row in of.values()):
        found.append(_table("texts that are those of transformers", rows, _identical))
    return found


def lowest(rows: Rows) -> str:
    """The smallest speed-up of any task and method but the first."""
    names = [name for name in _methods(rows)[1:] if name != AGAIN]
    of = [(row[name]["speed_up"], task, name) for task, row in rows.items() for name in names if name in row]
    if not of:
        return ""
    speed, task, name = min(of, key=lambda each: each[0]["median"])
    return f"Lowest: {name}, {task}: {interval(speed, 2)}. {MARKED}"


def picture(setting: str, rows: Rows) -> str:
    """SVG: the speed-ups of every task as bars with their intervals, and a line at 1."""
    names = [name for name in _methods(rows) if name != AGAIN][1:]
    bars = [(task, name, of[name]["speed_up"]) for task, of in rows.items() for name in names if name in of]
    scale = WIDTH / max(1.0, *(speed["high"] or speed["median"] for *_, speed in bars))
    parts = [f'<text x="0" y="14" font-weight="bold">{escape(setting)}</text>']
    for i, name in enumerate(names):
        x, colour = LABEL + i * WIDTH / max(len(names), 3), _colour(names, name)
        parts.append(f'<rect x="{x:.0f}" y="24" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15:.0f}" y="34">{escape(name)}</text>')
    y = top = 48
    for task, of in rows.items():
        drawn = [name for name in names if name in of]
        parts.append(
            f'<text x="{LABEL - 8}" y="{y + BAR * len(drawn) / 2 + 4:.0f}" text-anchor="end">{escape(task)}</text>'
        )
        for name in drawn:
            parts.append(_bar(y, of[name]["speed_up"], scale, _colour(names, name)))
            y += BAR
        y += GAP
    one = LABEL + scale
    parts.append(
        f'<path d="M{one:.1f} {top - 4}V{y - GAP + 4}" stroke="currentColor" stroke-dasharray="3 3" opacity=".6"/>'
    )
    size = f'viewBox="0 0 {LABEL + WIDTH + 50} {y}" width="{LABEL + WIDTH + 50}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="12" role="img" '
    )
    return f'{head}aria-label="{escape(setting)}: speed-up by task">{"".join(parts)}</svg>'


def _setting(result: dict[str, Any]) -> str:
    """What tells settings apart, in words."""
    options, settings = result["options"], result["settings"]
    heat = options["sampling"]["temperature"]
    law = f"T = {heat:g}" if heat else "greedy"
    more = [f"{key}={value}" for key, value in settings.items() if key.split(".")[0] not in (*WORDED, *NAMED)]
    rule = settings.get("rule", "sibling")
    return ", ".join(
        [settings["target"], options["dtype"], f"batch {options['batch']}", law, *more, *[rule] * (rule != "sibling")]
    )


def _named(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures by method, with what else tells methods apart in their names."""
    return {_name(result, name): row for name, row in result["figures"].items()}


def _name(result: dict[str, Any], method: str) -> str:
    """The first method and its repetition keep their names, as they have no draft."""
    if method in (next(iter(result["figures"])), AGAIN):
        return method
    settings = result["settings"]
    trained = [settings[key] for key in ("target.draft", "target.heads") if key in settings]
    chosen = [value for key, value in settings.items() if key.split(".")[0] in ("drafter", "tree")]
    return ", ".join([*(chosen if method == "chosen" else [method]), *trained])


def _ratios(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """[round, prompt]: tokens per second over those of the first method, of prompts that each method decoded in each round."""
    speeds = {name: np.array(of) for name, of in result["tokens_per_second"].items()}
    timed = np.all([of.all(0) for of in speeds.values()], 0)
    base = next(iter(speeds.values()))[:, timed]
    return {_name(result, name): of[:, timed] / base for name, of in speeds.items()}


def _over_all(rows: list[dict[str, Any]], ratios: list[dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """The median over the prompts of all tasks, and the mean of the tasks' acceptance lengths."""
    whole = [name for name in rows[0] if all(name in of for of in rows)]
    rounds = min((of[name].shape[0] for of in ratios for name in whole), default=0)
    speed = {name: median(np.hstack([of[name][:rounds] for of in ratios])) for name in whole}
    told = {
        name: {**speed[name], "resolved": resolved(speed[name], speed[AGAIN])} for name in whole[1:] if name != AGAIN
    }
    return {
        name: {
            "speed_up": told.get(name, speed[name]),
            "acceptance_length": float(np.mean([of[name]["acceptance_length"] for of in rows])),
            "identical": _sum([of[name].get("identical") for of in rows]),
            "prompts": _sum([of[name]["prompts"] for of in rows]),
        }
        for name in whole
    }


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _methods(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for of in rows.values() for name in of))


def _table(head: str, rows: Rows, cell: Callable[[dict[str, Any]], str]) -> list[list[str]]:
    names = _methods(rows)
    lines = [[task, *(cell(of[name]) if name in of else "-" for name in names)] for task, of in rows.items()]
    return [[head, *names], *lines]


def _acceptance(row: dict[str, Any]) -> str:
    rates = " ".join(f"{rate:.2f}" for rate in row.get("acceptance_rate", [])[:3])
    return f"{row['acceptance_length']:.2f}; {rates}" if rates else f"{row['acceptance_length']:.2f}"


def _identical(row: dict[str, Any]) -> str:
    return "-" if row["identical"] is None else f"{row['identical']}/{row['prompts']}"


def _colour(names: list[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _bar(y: int, speed: dict[str, Any], scale: float, colour: str) -> str:
    end, middle = LABEL + scale * speed["median"], y + BAR / 2 - 1
    parts = [f'<rect x="{LABEL}" y="{y}" width="{end - LABEL:.1f}" height="{BAR - 2}" fill="{colour}" opacity=".8"/>']
    if speed["low"] is not None:
        low, high = LABEL + scale * speed["low"], LABEL + scale * speed["high"]
        parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="currentColor" stroke-width="1.2"/>')
        end = max(end, high)
    return "".join([*parts, f'<text x="{end + 5:.1f}" y="{y + BAR - 3}" font-size="10">{speed["median"]:.2f}</text>'])
