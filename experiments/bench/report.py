"""From runs to figures, and from figures to tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import numpy as np

from experiments.bench.measure import AGAIN, Round, Run
from specdec import Generation
from specdec.trace import Trace

COLUMNS = {
    "tokens_per_second": "tokens/s (95 % CI)",
    "speed_up": "speed-up (95 % CI)",
    "predicted": "of forward passes alone",
    "acceptance_length": "acceptance length",
    "acceptance_rate": "acceptance rate by depth",
    "ceiling_share": "share of ceiling",
    "divergence": "divergence",
    "loop_share": "loop's own time",
    "identical": "= transformers",
}
MARKED = (
    "~: these runs cannot tell it from no difference, as its interval meets the noise floor's or 1, or it has none."
)
EXCEEDING = (
    "Share of ceiling: accepted tokens, of the most that a rule deciding node by node accepts on average. Block and traversal "
    "verification look further down the tree before they decide, and lossy rules accept what the target would not say: these "
    "may exceed 100 %. So may any rule by chance, in few tokens."
)


class Untimed(SystemExit):
    """There is nothing to compare, and the cure."""


def figures(
    rounds: list[Round], ceilings: dict[str, dict[str, Any]] | None = None, tasks: list[str] | None = None
) -> dict[str, dict[str, Any]]:
    """The figures of every method; speed-ups are over the first one, paired by round and batch. Batches of which a method has
    no step that was timed, as each of their texts ended with its first token, count in nothing that is.

    Args:
        tasks: of each batch, for figures by task.
    """
    unknown = {"ceiling_share": None, "divergence": None}
    found = {name: {**row, **unknown, **(ceilings or {}).get(name, {})} for name, row in _compared(rounds).items()}
    for task in dict.fromkeys(tasks or ()):
        its = [i for i, of in enumerate(tasks or ()) if of == task]
        part = [{name: [runs[i] for i in its] for name, runs in done.items()} for done in rounds]
        with suppress(Untimed):
            for name, row in _compared(part).items():
                found[name].setdefault("tasks", {})[task] = row
    return found


def table(
    figures: dict[str, dict[str, Any]],
    ratios: dict[str, dict[str, Any]] | None = None,
    absent: dict[str, str] | None = None,
) -> str:
    """The figures as markdown, by task too if there are several; a dash where a figure is not known.

    Args:
        ratios: of every method, over each of these (`over`).
        absent: methods that could not run, and why.
    """
    over = ratios or {}
    head = ["method", *COLUMNS.values(), *(f"over {peer}" for peer in over)]
    rows = [
        [name, *cells(row, *COLUMNS), *(interval(ratio[name], digits=2) for ratio in over.values())]
        for name, row in figures.items()
    ]
    lacking = [[name, why, *["-"] * (len(head) - 2)] for name, why in (absent or {}).items()]
    tables = [markdown([head, *rows, *lacking]), floor(figures), *exceeding(figures.values())]
    tasks = list(next(iter(figures.values())).get("tasks", {}))
    if len(tasks) > 1:
        head = ["speed-up (95 % CI), acceptance length", *tasks]
        tables.append(markdown([head, *([name, *map(_brief, row["tasks"].values())] for name, row in figures.items())]))
    return "\n\n".join(tables)


def floor(figures: dict[str, dict[str, Any]]) -> str:
    """How far apart two runs of one method are on this machine."""
    noise = interval(figures[AGAIN]["speed_up"], digits=2)
    return f"Noise floor: {next(iter(figures))} against itself, {noise}. {MARKED}"


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its header."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def resolved(ratio: dict[str, Any], noise: dict[str, Any]) -> bool:
    """Whether a ratio differs from 1 by more than chance and this machine's noise: no interval, no difference."""
    if ratio["n"] == 1:
        return False
    return ratio["low"] > max(1, noise["high"]) or ratio["high"] < min(1, noise["low"])


def speed(runs: list[list[Run]]) -> np.ndarray:
    """Tokens per second [round, batch]."""
    return np.array([[run.trace.summary()["tokens_per_second"] for run in row] for row in runs])


def over(finished: list[Round], peer: str) -> dict[str, Any]:
    """Speeds of all methods over one, paired by round and batch."""
    speeds = {name: speed([done[name] for done in finished]) for name in finished[0]}
    timed = speeds[peer].all(0)
    return {name: median(mine[:, timed] / speeds[peer][:, timed]) for name, mine in speeds.items()}


def median(values: np.ndarray) -> dict[str, float | None]:
    """Median of values [round, batch], its 95 % interval (None for a single value), and n."""
    return _bootstrap(np.median, values)


def mean(values: np.ndarray) -> dict[str, float | None]:
    """Mean of values [prompt], its 95 % interval (None for a single value), and n."""
    return _bootstrap(np.mean, values[None])


def per_prompt(runs: list[Generation]) -> np.ndarray:
    """[text]: tokens per forward while the text was running, over all runs."""
    steps = [step for run in runs for step in run.trace.steps]
    given = np.array([[text, n] for step in steps for text, n in zip(step.held, step.emitted, strict=True) if n])
    texts, tokens = given.T
    return np.bincount(texts, tokens) / np.bincount(texts)


def cells(row: dict[str, Any], *columns: str) -> list[str]:
    """These figures of a method as text; a dash where a figure is not known."""
    untold = () if row.get("loop_share") else ("predicted", "loop_share")  # transformers does not say
    unknown = [column for column in columns if column in untold or row.get(column) in (None, [])]
    return ["-" if column in unknown else _cell(row, column) for column in columns]


def exceeding(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What a share of the ceiling above 1 means, if there is one."""
    return [EXCEEDING] * any((row.get("ceiling_share") or 0) > 1 for row in rows)


def interval(found: dict[str, Any], digits: int, to: str = "-") -> str:
    """Median or mean and interval as text, behind ~ if it is of a difference that is not resolved."""
    mark = "" if found.get("resolved", True) else "~ "
    middle = f"{mark}{found['median' if 'median' in found else 'mean']:.{digits}f}"
    return middle if found["n"] == 1 else f"{middle} ({found['low']:.{digits}f}{to}{found['high']:.{digits}f})"


def _cell(row: dict[str, Any], column: str) -> str:
    value = row[column]
    match column:
        case "tokens_per_second" | "speed_up":
            return interval(value, digits=0 if column == "tokens_per_second" else 2)
        case "predicted" | "acceptance_length":
            return f"{value:.2f}"
        case "acceptance_rate":
            return " ".join(f"{rate:.2f}" for rate in value)
        case "ceiling_share" | "loop_share":
            return f"{value:.0%}"
        case "divergence":
            return f"{value:.3g}"
        case _:
            return f"{value}/{row['prompts']}"


def _bootstrap(figure: Callable[..., Any], values: np.ndarray) -> dict[str, float | None]:
    """Rounds and batches are drawn, each with replacement: a prompt decoded again is not another prompt."""
    name, found = figure.__name__, float(figure(values))
    if values.size == 1:
        return {name: found, "low": None, "high": None, "n": 1}
    random, (rounds, batches) = np.random.default_rng(0), values.shape
    drawn = random.integers(rounds, size=(2000, rounds, 1)), random.integers(batches, size=(2000, 1, batches))
    low, high = np.percentile(figure(values[drawn], axis=(1, 2)), [2.5, 97.5])
    return {name: found, "low": float(low), "high": float(high), "n": values.size}


def _compared(rounds: list[Round]) -> dict[str, dict[str, Any]]:
    by_method = {name: [done[name] for done in rounds] for name in rounds[0]}
    speeds = {name: speed(runs) for name, runs in by_method.items()}
    timed = np.all([found.all(0) for found in speeds.values()], 0)  # transformers writes the first token in its prefill
    if not timed.any():
        raise Untimed("All texts ended with the first token, so no decoding was timed: set a larger new_tokens.")
    speeds = {name: found[:, timed] for name, found in speeds.items()}
    first, base = next(iter(speeds.items()))
    ratios = {name: median(mine / base) for name, mine in speeds.items()}
    compared = {
        name: ratio if name in (first, AGAIN) else {**ratio, "resolved": resolved(ratio, ratios[AGAIN])}
        for name, ratio in ratios.items()
    }
    return {
        name: {"tokens_per_second": median(speeds[name]), "speed_up": compared[name], **_pooled(runs, by_method[first])}
        for name, runs in by_method.items()
    }


def _pooled(runs: list[list[Run]], base: list[list[Run]]) -> dict[str, Any]:
    """What is counted over all steps of all runs; texts are compared in the first round, as the others repeat it.

    `predicted` is the speed-up over `base` if a step took no more time than drafting and the target's forward pass: acceptance
    length x t_verify(1) / (t_draft + t_verify(nodes)), by the times of these runs.
    """
    summary = _summary(runs)
    return {
        "predicted": _of_passes(summary) / _of_passes(_summary(base)),
        "acceptance_length": summary["acceptance_length"],
        "acceptance_rate": summary["acceptance_rate"],
        "loop_share": summary["other_seconds"] / summary["decode_seconds"],
        "milliseconds_per_step": {
            part: 1e3 * summary[f"{part}_seconds"] / summary["target_forwards"] for part in ("draft", "verify", "other")
        },
        "identical": None if runs[0][0].identical is None else sum(run.identical or 0 for run in runs[0]),
        "prompts": sum(run.prompts for run in runs[0]),
    }


def _summary(runs: list[list[Run]]) -> dict[str, Any]:
    return Trace(steps=[step for row in runs for run in row for step in run.trace.steps]).summary()


def _of_passes(summary: dict[str, Any]) -> float:
    """Tokens per second of drafting and forward passes."""
    return summary["tokens"] / (summary["draft_seconds"] + summary["verify_seconds"])


def _brief(row: dict[str, Any]) -> str:
    return f"{interval(row['speed_up'], digits=2)}, {row['acceptance_length']:.2f}"
