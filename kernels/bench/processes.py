"""The methods of a benchmark, each in a process of its own: one that breaks the device takes no other with it.

A process writes one row for each of its shapes, as it goes. If it dies, the shape it died at gets the reason for a row, and
the next process begins after it.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
import torch

GRACE = 30  # seconds that a shape may take which was begun in time: it may have to be compiled
OURS = "specdec"


@dataclass(frozen=True)
class Benchmark:
    """What is timed, and how."""

    script: str  # its file
    name: str  # of its results, with {gpu} and {date}
    ops: tuple[str, ...]  # whose tests are listed beside the table
    methods: tuple[str, ...]  # the most telling first
    # (method, whether this is a dry run) -> dataclasses, the most telling first
    shapes: Callable[[str, bool], Sequence[Any]]
    # (shape, method, device) -> columns; raises if there are none
    figures: Callable[[Any, str, str], dict[str, Any]]
    notes: dict[str, Any]


def main(benchmark: Benchmark, seconds: float) -> None:
    """The command line of a benchmark. Exits with 1 if shapes have no figures of ours."""
    options = arguments(seconds, benchmark.methods)
    options.add_argument("--tests", type=Path, help="folder of JUnit XML of kernels/tests/gpu")
    chosen = options.parse_args()
    if chosen.method is None:
        _all(benchmark, chosen)
    else:
        shapes = benchmark.shapes(chosen.method, chosen.dry_run)
        write_rows(chosen, shapes, lambda shape, device: benchmark.figures(shape, chosen.method, device))


def arguments(seconds: float, methods: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """What every benchmark is told, by whoever runs it and by itself when it starts the process of a method."""
    options = argparse.ArgumentParser()
    options.add_argument("--seconds", type=float, default=seconds, help="begin nothing after so long")
    options.add_argument("--results", type=Path, default=report.ROOT / "experiments/results")
    options.add_argument("--dry-run", action="store_true", help="on the CPU, small: no GPU is needed")
    options.add_argument("--method", choices=methods, help="only this one, in this process")
    options.add_argument("--start", type=int, default=0, help="of the shapes of --method, the first to be timed")
    options.add_argument("--rows", type=Path, help="where --method writes its rows")
    return options


def _all(benchmark: Benchmark, chosen: argparse.Namespace) -> None:
    notes = {**report.provenance(), **benchmark.notes}
    if chosen.tests is not None:
        notes["tests that are not green"] = report.red(chosen.tests, *benchmark.ops)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    end, count = time.monotonic() + chosen.seconds, len(benchmark.methods)
    for i, method in enumerate(benchmark.methods):
        shapes = benchmark.shapes(method, chosen.dry_run)
        parts = min(count, 2) if i == 0 else count - i  # half of the time is for the first method
        command = [benchmark.script, "--method", method, *(["--dry-run"] if chosen.dry_run else [])]
        found = rows_of(command, len(shapes), (end - time.monotonic()) / parts)
        rows += [{**asdict(shape), "method": method, **row} for shape, row in zip(shapes, found, strict=False)]
        left_out += [f"{method}, {asdict(shape)}" for shape in shapes[len(found) :]]
        path = report.write(rows, {**notes, "left out for want of time": left_out}, chosen.results, benchmark.name)
    print(path)  # now: time may run out
    ours = (OURS,) if OURS in benchmark.methods else benchmark.methods  # rivals may refuse
    if faults := [row for row in rows if row["method"] in ours and "reason" in row]:
        sys.exit(f"{len(faults)} shapes have no figures of ours: {faults}")


def rows_of(command: list[str], count: int, seconds: float) -> list[dict[str, Any]]:
    """What processes of this command write for shapes 0 .. count - 1, as far as time goes."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.touch()
        while True:
            rows, left = [json.loads(line) for line in path.read_text("utf-8").splitlines()], end - time.monotonic()
            if len(rows) >= count or left <= 0:
                return rows
            options = ["--start", str(len(rows)), "--rows", str(path), "--seconds", f"{left:.0f}"]
            died = _died([*command, *options], left + GRACE)
            if died is None:
                return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            with path.open("a", encoding="utf-8") as file:
                if len(path.read_text("utf-8").splitlines()) == len(rows):  # nothing new: that shape is given up
                    file.write(json.dumps({"reason": died}) + "\n")


def _died(command: list[str], seconds: float) -> str | None:
    """Run a script; why it did not end as it should, if it did not."""
    try:
        status = subprocess.run([sys.executable, *command], timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"out of time: killed after {seconds:.0f} s"
    if status < 0:
        return f"the process died: killed by {signal.Signals(-status).name}"
    return f"the process died: exit status {status}" if status else None


def write_rows(
    chosen: argparse.Namespace, shapes: Sequence[Any], figures: Callable[[Any, str], dict[str, Any]]
) -> None:
    """The part of the process of one method: a row for each shape from `--start` on, as far as time goes.

    Args:
        figures: (shape, device) -> columns; raises if there are none.
    """
    end, device = time.monotonic() + chosen.seconds, "cpu" if chosen.dry_run else "cuda"
    for shape in shapes[chosen.start :]:
        if time.monotonic() > end:
            return
        print(chosen.method, shape, flush=True)
        _write_row(chosen.rows, device, lambda shape=shape: figures(shape, device))


def _write_row(path: Path, device: str, figures: Callable[[], dict[str, Any]]) -> None:
    """Append a row of figures, or of the reason why there are none; SystemExit if the device is broken for good."""
    try:
        row = figures()
    except Exception as error:
        traceback.print_exc()
        row = {"reason": report.reason(error)}
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            traceback.print_exc()
            sys.exit(3)
