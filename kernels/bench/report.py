"""What every benchmark of a kernel does: ask whether its tests passed, measure, and write down what produced the figures."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from floors import RATES, Compaction, Laws, Shape, floor

ROOT = Path(__file__).resolve().parents[2]
REPLAYS = 20
WARM = 0.1  # seconds of replays first: a chip that has waited for the compiler has its clocks down
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes, several caches, by which the bandwidth is measured


class Timing(NamedTuple):
    """Of one call."""

    seconds: float  # median
    spread: float  # between the first and the last decile, relative to the median


def asked(seconds: float, *ops: str) -> argparse.Namespace:
    """The command line of a benchmark of these ops; exits unless their tests were green."""
    options = argparse.ArgumentParser()
    options.add_argument("--tests", type=Path, required=True, help="folder of JUnit XML of kernels/tests/gpu")
    options.add_argument("--seconds", type=float, default=seconds, help="begin no shape after so long")
    options.add_argument("--results", type=Path, default=ROOT / "experiments/results")
    chosen = options.parse_args()
    require_green(chosen.tests, *ops)
    return chosen


def require_green(tests: Path, *ops: str) -> None:
    """Exit unless there are reports OP.*.xml (JUnit's) of tests of each op on the device and every one of them passed."""
    for op in ops:
        if fault := _fault(sorted(tests.glob(f"{op}.*.xml"))):
            sys.exit(f"{op}: no timings of a kernel whose tests are not green ({fault}). See {tests}.")


def _fault(tests: list[Path]) -> str | None:
    if unended := [path.stem for path in tests if not path.read_bytes()]:
        return f"{', '.join(unended)} did not end"
    cases = [case for path in tests for case in ElementTree.parse(path).iter("testcase")]
    bad = [
        case.get("name") for case in cases if any(case.find(end) is not None for end in ("failure", "error", "skipped"))
    ]
    if not cases:
        return "none ran"
    return f"{len(bad)} of {len(cases)} did not pass: {', '.join(map(str, bad[:5]))}" if bad else None


def measure(calls: Sequence[Callable[[], object]]) -> Timing:
    """Of one call, by replays of a CUDA graph that makes each of `calls` once, after warming up."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    began = time.perf_counter()
    while time.perf_counter() - began < WARM:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    median, deciles = statistics.median(times), statistics.quantiles(times, n=10)
    return Timing(median, (deciles[-1] - deciles[0]) / median)


def bandwidth(device: str) -> float:
    """Bytes per second of copying a large tensor, read and written."""
    source = torch.ones(COPIED[device] // 4, device=device)
    goal, times = torch.empty_like(source), []
    if device == "cuda":
        return 2 * COPIED[device] / measure([lambda: goal.copy_(source)]).seconds
    for _ in range(5):
        began = time.perf_counter()
        goal.copy_(source)
        times.append(time.perf_counter() - began)
    return 2 * COPIED[device] / statistics.median(times)


def figures(shape: Shape | Laws | Compaction, timing: Timing) -> dict[str, Any]:
    """What a measured time amounts to."""
    rates, seconds = RATES.get(gpu()), timing.seconds
    return {
        "us": seconds * 1e6,
        "spread %": 100 * timing.spread,
        "floor us": floor(shape, rates) * 1e6 if rates else None,
        "% of floor": 100 * floor(shape, rates) / seconds if rates else None,
        "GB/s": shape.bytes / seconds / 1e9,
        "TFLOP/s": shape.flops / seconds / 1e12 if shape.flops else None,
    }


def reason(error: Exception) -> str:
    """Why there are no figures, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0][:120]


def require_ours(rows: list[dict[str, Any]]) -> None:
    """Exit if shapes have no figures of our own kernels."""
    if ours := [row for row in rows if row["method"] == "specdec" and "reason" in row]:
        sys.exit(f"{len(ours)} shapes have no figures of ours: {ours}")


def write(rows: list[dict[str, Any]], notes: dict[str, Any], folder: Path, pattern: str) -> Path:
    """A JSON file with everything and a Markdown file with the table; returns the first.

    `pattern` is their name, with {gpu} and {date} to be filled in.
    """
    chip, date = notes["gpu"].removeprefix("NVIDIA ").replace(" ", "_").lower(), notes["date"][:10].replace("-", "")
    name = pattern.format(gpu=chip, date=date)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**notes, "rows": rows}, indent=1) + "\n", "utf-8")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_cell(row.get(column)) for column in columns) for row in rows]
    head = [f"- {key}: {value}" for key, value in notes.items()]
    path.with_suffix(".md").write_text(
        "\n".join([f"# {name}", "", *head, "", *(f"| {x} |" for x in lines), ""]), "utf-8"
    )
    return path


def provenance() -> dict[str, Any]:
    """Commit (COMMIT names it where there is no git), versions, device, clocks and date."""
    status = _run("git", "status", "--porcelain")
    return {
        "commit": os.environ.get("COMMIT") or _run("git", "rev-parse", "HEAD"),
        "dirty": bool(status) if status is not None else None,
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "triton", "transformers")},
        },
        "cuda": torch.version.cuda,
        "gpu": gpu(),
        "clocks": _run(
            "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit", "--format=csv,noheader"
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def gpu() -> str:
    """The name of the current device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _run(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
