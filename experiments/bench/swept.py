"""The jobs of a sweep together: what varies, what every method came to at every point, and what was refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from experiments.bench.measure import AGAIN
from experiments.bench.report import median, resolved

ALL, TASK, TEMPERATURE = "all tasks", "task.tasks", "sampling.temperature"
NAMED = ("drafter", "tree", "target.draft", "target.heads")  # said in the names of methods
PARTS = ("methods", "drafter", "tree", "rule")  # that a job without such a setting has no use for
Job = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A method at one point of a sweep."""

    at: tuple[str, ...]  # the value on each axis
    method: str
    figures: dict[str, Any]
    noise: dict[str, Any]  # the speed-up of the first method over itself
    ratios: np.ndarray  # [round, prompt]: tokens per second over the first method
    again: np.ndarray  # [round, prompt]: those of the first method over itself
    over: dict[str, np.ndarray]  # [round, prompt]: those over other methods, by their names


@dataclass(frozen=True)
class Sweep:
    """Points in the order of the axes, and the combinations that have none."""

    axes: tuple[str, ...]  # keys of the settings that vary
    shared: dict[str, str]  # the settings that do not
    points: list[Point]
    refused: dict[str, list[str]]  # combinations by reason
    jobs: list[Job]  # that were measured

    def __str__(self) -> str:
        """What it compares, in words."""
        by = ["method"] * (len({point.method for point in self.points}) > 1)
        return f"{self.shared.get('target', 'Sweep')} by {', '.join([*by, *map(titled, self.axes)])}"

    @property
    def peers(self) -> list[str]:
        """Methods that others are compared with, besides the first."""
        return list(dict.fromkeys(peer for point in self.points for peer in point.over))

    def values(self, axis: int) -> list[str]:
        return list(dict.fromkeys(point.at[axis] for point in self.points))


def sweep(results: list[Job]) -> Sweep:
    """All jobs of a sweep. Jobs at one point add their methods to it; where every task measured a method, `ALL` is a task more.

    Args:
        results: what the jobs wrote, with their "settings".
    """
    jobs = sorted((result for result in results if "figures" in result), key=lambda job: job.get("date", ""))
    keys = dict.fromkeys(key for result in results for key in result["settings"])
    values = {key: [value(job, key) for job in jobs] for key in keys}
    varied = [key for key in keys if len(set(values[key])) > 1]
    axes = [key for key in varied if key not in (*NAMED, "methods") and None not in values[key]]
    axes.sort(key=lambda key: key == TASK)  # the task comes last
    named = [key for key in varied if key not in (*axes, "methods", "drafter", "tree")]
    ranks = [_ranks(values[key]) for key in axes]
    points = [point for job in jobs for point in _points(job, axes, named)]
    points.sort(key=lambda point: [rank[at] for rank, at in zip(ranks, point.at, strict=True)])
    shared = {key: of[0] for key, of in values.items() if key not in varied and of and of[0] is not None}
    if TEMPERATURE in keys:
        shared.pop("sampling", None)  # a preset, whose temperature is another
    return Sweep(tuple(axes), shared, [*points, *_over_all(points, axes)], _refused(results), jobs)


def value(job: Job, key: str) -> str | None:
    """A setting of a job as it was given, or else its default; None if the job has no use for it."""
    found: Any = job["settings"].get(key)
    if found is None and key.partition(".")[0] not in PARTS and key not in NAMED:
        found = job.get("options")
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    said = None if found is None or isinstance(found, dict) else str(found).strip("[]'")
    return f"{float(said):g}" if said is not None and number(said) else said


def titled(key: str) -> str:
    """The name of a setting in words."""
    return {TASK: "task", TEMPERATURE: "temperature"}.get(key, key.replace(".", " "))


def words(key: str, said: str) -> str:
    """A value of a setting, such that it can stand alone."""
    if key == TEMPERATURE:
        return f"T = {said}" if float(said) else "greedy"
    return f"{titled(key)} {said}" if number(said) else said.replace("_", " ")


def number(said: str | None) -> bool:
    try:
        return said is not None and np.isfinite(float(said))
    except ValueError:
        return False


def _points(job: Job, axes: list[str], named: list[str]) -> list[Point]:
    at, figures = tuple(str(value(job, key)) for key in axes), job["figures"]
    speeds = {name: np.array(of) for name, of in job["tokens_per_second"].items()}
    timed = np.all([of.all(0) for of in speeds.values()], 0)
    base, *others = (name for name in figures if name != AGAIN)
    ratios = {name: of[:, timed] / speeds[base][:, timed] for name, of in speeds.items()}
    noise, again = figures[AGAIN]["speed_up"], ratios[AGAIN]
    peers = [peer for peer in job.get("over", {}) if peer in others]
    over = {name: {peer: ratios[name] / ratios[peer] for peer in peers} for name in others}
    return [
        Point(at, _name(job, name, named), figures[name], noise, ratios[name], again, over[name]) for name in others
    ]


def _name(job: Job, method: str, named: list[str]) -> str:
    """The method, or what `chosen` stands for, and the settings that only some jobs have."""
    keys = [*(("drafter", "tree") if method == "chosen" else ()), *named]
    told = [words(key, str(value(job, key))) for key in keys if value(job, key) is not None]
    return ", ".join([*[method.replace("_", " ")] * (method != "chosen"), *told])


def _ranks(values: Iterable[str | None]) -> dict[str | None, int]:
    """Numbers are ranked by their size, others as they came."""
    known = list(dict.fromkeys(values))
    if all(map(number, known)):
        known.sort(key=lambda said: float(said or 0))
    return {said: rank for rank, said in enumerate(known)}


def _over_all(points: list[Point], axes: list[str]) -> list[Point]:
    """The median over the prompts of all tasks, and the mean of the tasks' acceptance lengths."""
    tasks = {point.at[-1] for point in points} if TASK in axes else set()
    if not tasks or any("," in task for task in tasks):
        return []
    groups: dict[Any, list[Point]] = {}
    for point in points:
        groups.setdefault((point.at[:-1], point.method), []).append(point)
    whole = {key: of for key, of in groups.items() if {point.at[-1] for point in of} == tasks}
    return [_pooled((*at, ALL), method, of) for (at, method), of in whole.items()]


def _pooled(at: tuple[str, ...], method: str, points: list[Point]) -> Point:
    ratios, again = _beside(point.ratios for point in points), _beside(point.again for point in points)
    peers = [peer for peer in points[0].over if all(peer in point.over for point in points)]
    over = {peer: _beside(point.over[peer] for point in points) for peer in peers}
    speed, noise = median(ratios), median(again)
    figures = {
        "speed_up": {**speed, "resolved": resolved(speed, noise)},
        "acceptance_length": float(np.mean([point.figures["acceptance_length"] for point in points])),
        "identical": _sum([point.figures["identical"] for point in points]),
        "prompts": _sum([point.figures["prompts"] for point in points]),
    }
    return Point(at, method, figures, noise, ratios, again, over)


def _beside(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Ratios of several jobs, of as many rounds as all have."""
    found = [*parts]
    return np.hstack([part[: min(map(len, found))] for part in found])


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _refused(results: list[Job]) -> dict[str, list[str]]:
    """What could not be measured, by reasons: combinations, as in a command if these are all combinations of some values."""
    found: dict[str, list[dict[str, str]]] = {}
    for result in results:
        own = result["settings"]
        varied = [key for key in own if any(other["settings"].get(key) != own[key] for other in results)]
        for reason in _reasons(result):
            found.setdefault(reason, []).append({key: own[key] for key in varied})
    return {reason: _factored(jobs) for reason, jobs in found.items()}


def _reasons(result: Job) -> list[str]:
    """Why a job, or some of its methods, could not be measured."""
    if "figures" not in result:
        return [next(f"{verdict}: {result[verdict]}" for verdict in ("refused", "failed") if verdict in result)]
    return [f"{method} could not run: {why}" for method, why in result.get("absent", {}).items()]


def _factored(jobs: list[dict[str, str]]) -> list[str]:
    values = {key: sorted({job[key] for job in jobs if key in job}) for key in jobs[0]}
    whole = all(set(job) == set(values) for job in jobs) and prod(map(len, values.values())) == len(jobs)
    told = [values] if whole else [{key: [said] for key, said in job.items()} for job in jobs]
    return [" ".join(f"{key}={','.join(of)}" for key, of in each.items()) for each in told]
