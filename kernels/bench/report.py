"""What every benchmark of a kernel does: measure, say which tests are red, and write down what produced the figures."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from floors import RATES, Work, floor
from meter import LoadMeter

from experiments.bench.report import markdown
from specdec.clock import Clock, finish

ROOT = Path(__file__).resolve().parents[2]
REPLAYS = 20
WARM = 0.1  # seconds of replays first: a chip that has waited for the compiler has its clocks down
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes, several caches, by which the bandwidth is measured


class Timing(NamedTuple):
    """Of one call."""

    seconds: float  # median
    spread: float  # between the first and the last decile, relative to the median
    load: dict[str, Any] = {}  # noqa: RUF012  clock, power and temperature meanwhile: see `LoadMeter.columns`


def red(tests: Path, *ops: str) -> list[str]:
    """The tests of these ops on the device that did not pass, of reports OP.*.xml (JUnit's), and reports without an end."""
    found = []
    for op in ops:
        cases: list[ElementTree.Element] = []
        for path in sorted(tests.glob(f"{op}.*.xml")):
            try:
                cases += ElementTree.parse(path).iter("testcase")
            except ElementTree.ParseError:  # empty, or cut off while it was written
                found.append(f"{path.stem} did not end")
        ends = [
            (case, next((e for e in ("failure", "error", "skipped") if case.find(e) is not None), None))
            for case in cases
        ]
        found += [f"{op}: {case.get('name')} ({end})" for case, end in ends if end]
        if not cases:
            found.append(f"{op}: none ran")
    return found


def captured(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Replays of a CUDA graph of this call, which must have been made before; on a CPU the call itself stands in for it."""
    if device != "cuda":
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def measure(calls: Sequence[Callable[[], object]], device: str = "cuda") -> Timing:
    """Of one call, by replays of a CUDA graph that makes each of `calls` once, after warming up under the load's meter."""
    for call in calls[:2]:
        call()
    replay = captured(lambda: [call() for call in calls], device)
    with LoadMeter(device) as meter:
        began = time.perf_counter()
        while time.perf_counter() - began < WARM:
            replay()
            finish(torch.device(device))
    times = []
    for _ in range(REPLAYS if device == "cuda" else 2):
        clock = Clock(torch.device(device))
        replay()
        clock.mark()
        times.append(clock.seconds()[0] / len(calls))
    median, deciles = statistics.median(times), statistics.quantiles(times, n=10)
    return Timing(median, (deciles[-1] - deciles[0]) / median, meter.columns())


def bandwidth(device: str) -> float:
    """Bytes per second of copying a large tensor, read and written."""
    source = torch.ones(COPIED[device] // 4, device=device)
    goal = torch.empty_like(source)
    return 2 * COPIED[device] / measure([lambda: goal.copy_(source)], device).seconds


def figures(shape: Work, timing: Timing) -> dict[str, Any]:
    """What a measured time amounts to."""
    rates, seconds = RATES.get(gpu()), timing.seconds
    return {
        "us": seconds * 1e6,
        "spread %": 100 * timing.spread,
        "floor us": floor(shape, rates) * 1e6 if rates else None,
        "% of floor": 100 * floor(shape, rates) / seconds if rates else None,
        "GB/s": shape.bytes / seconds / 1e9,
        "TFLOP/s": shape.flops / seconds / 1e12 if shape.flops else None,
        **timing.load,
    }


def reason(error: Exception) -> str:
    """Why there are no figures, in one line: also of what was raised before, on whose way out this was raised."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
    before = error.__context__
    return f"{text}; before that {reason(before)}" if isinstance(before, Exception) else text


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
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    head = [f"- {key}: {value}" for key, value in notes.items()]
    text = "\n".join([f"# {name}", "", *head, "", markdown([columns, *cells]), ""])
    path.with_suffix(".md").write_text(text, "utf-8")
    return path


def provenance() -> dict[str, Any]:
    """Commit (COMMIT names it where there is no git), versions, device, its limits and date."""
    status = _run("git", "status", "--porcelain")
    return {
        "commit": os.environ.get("COMMIT") or _run("git", "rev-parse", "HEAD"),
        "dirty": bool(status) if status is not None else None,
        "versions": {
            "python": sys.version.split()[0],
            **{name: _version(name) for name in ("torch", "triton", "transformers")},
        },
        "cuda": torch.version.cuda,
        "gpu": gpu(),
        "limits": _run("nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def gpu() -> str:
    """The name of the current device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _version(module: str) -> str | None:
    """What a module says of itself: not every build of it comes with the metadata of a distribution. None without it."""
    try:
        return str(import_module(module).__version__)
    except (ImportError, AttributeError):
        return None


def _run(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
