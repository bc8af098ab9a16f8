"""A sweep as one table, with what is needed to read it."""

from __future__ import annotations

from experiments.bench.report import COLUMNS, MARKED, cells, exceeding, interval, markdown, median
from experiments.bench.swept import Point, Sweep, titled, words

FIGURES = tuple(column for column in COLUMNS if column not in ("speed_up", "predicted", "acceptance_rate"))
FIGURES += ("acceptance_rate",)  # last, as it is long


def text(sweep: Sweep) -> str:
    """What all jobs share, the table, how to read it, and what was refused, as markdown."""
    return "\n\n".join([shared(sweep), markdown(table(sweep)), *notes(sweep), *refusals(sweep)])


def table(sweep: Sweep) -> list[list[str]]:
    """A row for every method at every point. The first row is the header."""
    peers = [f"over {peer.replace('_', ' ')}" for peer in sweep.peers]
    speeds = COLUMNS["speed_up"], "noise floor", *peers
    head = [*map(titled, sweep.axes), "method", *speeds, *(COLUMNS[key] for key in FIGURES)]
    return [head, *(_row(point, sweep.peers) for point in sweep.points)]


def shared(sweep: Sweep) -> str:
    """The settings that do not vary, and where the jobs ran."""
    made = {f"commit {job['commit']} on {job['gpu'] or job['cpu']}" for job in sweep.jobs}
    return "; ".join([" ".join(f"{key}={value}" for key, value in sweep.shared.items()), *sorted(made)])


def notes(sweep: Sweep) -> list[str]:
    """What the signs and figures of the table mean, and its smallest speed-up."""
    said = [MARKED, *exceeding(point.figures for point in sweep.points)]
    if not sweep.points:
        return said
    lowest = min(sweep.points, key=lambda point: point.figures["speed_up"]["median"])
    return [*said, f"Lowest: {label(sweep, lowest)}: {interval(lowest.figures['speed_up'], 2)}."]


def refusals(sweep: Sweep) -> list[str]:
    """Every reason, and the combinations that it stands for."""
    return [f"{' '.join(why.split())} ({'; '.join(sorted(jobs))})" for why, jobs in sweep.refused.items()]


def label(sweep: Sweep, point: Point) -> str:
    """A method and where it was measured, in words."""
    return ", ".join([point.method, *(words(key, at) for key, at in zip(sweep.axes, point.at, strict=True))])


def _row(point: Point, peers: list[str]) -> list[str]:
    noise = interval(point.noise, digits=2)
    over = [interval(median(point.over[peer]), digits=2) if peer in point.over else "-" for peer in peers]
    return [*point.at, point.method, *cells(point.figures, "speed_up"), noise, *over, *cells(point.figures, *FIGURES)]
