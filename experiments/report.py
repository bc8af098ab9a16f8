"""From runs to figures, and from figures to one table."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.measure import Round, Run
from specdec.trace import Trace

HEADER = [
    "method", "tokens/s (95 % CI)", "speed-up (95 % CI)", "acceptance length", "acceptance rate by depth",
    "share of ceiling", "divergence", "loop's own time", "= transformers",
]  # fmt: skip


def figures(rounds: list[Round], ceilings: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """The figures of every method; speed-ups are over the first one, paired by round and batch."""
    unknown = {"ceiling_share": None, "divergence": None}
    by_method = {name: [done[name] for done in rounds] for name in rounds[0]}
    speeds = {name: speed(runs) for name, runs in by_method.items()}
    base = next(iter(speeds.values()))
    return {
        name: {
            "tokens_per_second": median(mine),
            "speed_up": median(mine / base),
            **unknown,
            **(ceilings or {}).get(name, {}),
            **_pooled(by_method[name]),
        }
        for name, mine in speeds.items()
    }


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as a markdown table; a dash where a figure is not known."""
    rows = [HEADER, ["---"] * len(HEADER), *([name, *_cells(row)] for name, row in figures.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def speed(runs: list[list[Run]]) -> np.ndarray:
    """Tokens per second [round, batch]."""
    return np.array([[run.trace.summary()["tokens_per_second"] for run in row] for row in runs])


def median(values: np.ndarray) -> dict[str, float | None]:
    """Median of values [round, batch], its 95 % interval (None for a single value), and n.

    The bootstrap draws rounds and batches, each with replacement: a prompt decoded again is not another prompt.
    """
    if values.size == 1:
        return {"median": values.item(), "low": None, "high": None, "n": 1}
    random, (rounds, batches) = np.random.default_rng(0), values.shape
    drawn = random.integers(rounds, size=(2000, rounds, 1)), random.integers(batches, size=(2000, 1, batches))
    low, high = np.percentile(np.median(values[drawn], axis=(1, 2)), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high), "n": values.size}


def _pooled(runs: list[list[Run]]) -> dict[str, Any]:
    """What is counted over all steps of all runs; texts are compared in the first round, as the others repeat it."""
    summary = Trace(steps=[step for row in runs for run in row for step in run.trace.steps]).summary()
    return {
        "acceptance_length": summary["acceptance_length"],
        "acceptance_rate": summary["acceptance_rate"],
        "loop_share": summary["other_seconds"] / summary["decode_seconds"],
        "identical": None if runs[0][0].identical is None else sum(run.identical or 0 for run in runs[0]),
        "prompts": sum(run.prompts for run in runs[0]),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        _interval(row["tokens_per_second"], digits=0),
        _interval(row["speed_up"], digits=2),
        f"{row['acceptance_length']:.2f}",
        " ".join(f"{rate:.2f}" for rate in row["acceptance_rate"]) or "-",
        "-" if row["ceiling_share"] is None else f"{row['ceiling_share']:.0%}",
        "-" if row["divergence"] is None else f"{row['divergence']:.3g}",
        f"{row['loop_share']:.0%}" if row["loop_share"] else "-",  # transformers does not say
        "-" if row["identical"] is None else f"{row['identical']}/{row['prompts']}",
    ]


def _interval(found: dict[str, Any], digits: int) -> str:
    median = f"{found['median']:.{digits}f}"
    return median if found["n"] == 1 else f"{median} ({found['low']:.{digits}f}-{found['high']:.{digits}f})"
