"""What needs a GPU, in three calls of at most nine minutes each: `make gpu-smoke`, then `make gpu`, then `make engine`.

    python experiments/gpu.py smoke        python experiments/gpu.py smoke --dry-run

Needs torch >= 2.11 with CUDA, triton >= 3.6, transformers >= 5.17, pytest and this checkout; no network, no git, and nothing
is installed. A call runs its parts in processes, each with a limit of time, and whatever becomes of them leaves one archive,
RESULTS/<call>_call.tar.gz, written anew after every round: tables, logs, JUnit reports, and parts.json, which says how each
part ended. Environment:

    RESULTS=folder            of the archive; experiments/results by default
    COMMIT=name               what was checked out, where there is no git
    TRITON_CACHE_DIR=folder   compiled kernels, for all calls; outputs/triton by default
    KERNELS=archive.tar.gz    kernels compiled beforehand (kernels/tools/precompile.py), unpacked there first
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 535  # that a call may take
FINISH = 40  # seconds for what was begun in time
TAIL = 700  # characters of a log that are printed of a part, twice as many if it failed
DEVICE = "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'torch sees no GPU here')"


class Part(NamedTuple):
    """One process."""

    name: str
    command: tuple[str, ...]  # after the Python
    seconds: float  # limit
    environment: dict[str, str] = {}  # noqa: RUF012


class End(NamedTuple):
    """What became of a part."""

    name: str
    ended: str
    seconds: float


Plan = list[list[Part]]  # rounds, one after the other; the parts of a round run side by side


def bench(name: str, limit: float, *options: str) -> list[Part]:
    """A round of one benchmark, which begins nothing in its last `FINISH` seconds."""
    return [Part(name, (f"kernels/bench/{name}.py", "--results", "{out}", "--seconds", "{seconds}", *options), limit)]


def suite(**parts: int) -> list[Part]:
    """Tests on the device: they mostly wait for the compiler, and most of what it makes belongs to one part of a file."""
    # whatever else is installed there: no plugin of it is loaded, and no warning of it is an error
    shared = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    return [
        Part(
            f"{name}.{i}",
            ("-m", "pytest", f"kernels/tests/gpu/test_{name}.py", "-q", "-W", "default", f"--junitxml={{out}}/{name}.{i}.xml"),
            240,
            {**shared, "PART": f"{i}/{count}"},
        )
        for name, count in parts.items()
        for i in range(1, count + 1)
    ]  # fmt: skip


PLANS: dict[str, Plan] = {  # the last part of each takes the time that the others leave
    "smoke": [
        bench("smoke", 170),
        bench("bench_splits", 110),
        bench(
            "bench_engine", SECONDS, "--cases", "8B,1,1024", "Llama-3-8B,1,1024", "--engines", "eager", "graph", "--few"
        ),
    ],
    "gpu": [
        suite(compact=1, law=1, verify=5, graphs=4, tree_attention=5),
        bench("bench_verify", 120, "--tests", "{out}"),
        bench("bench_tree_attention", SECONDS, "--tests", "{out}"),
    ],
    "engine": [bench("bench_head", 90), bench("bench_engine", SECONDS)],
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("call", choices=PLANS)
    options.add_argument(
        "--dry-run", action="store_true", help="the benchmarks on the CPU, small; tests are skipped there"
    )
    chosen = options.parse_args()
    results = Path(os.environ.get("RESULTS") or ROOT / "experiments/results").absolute()
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or ROOT / "outputs/triton").absolute()
    os.environ.update(TRITON_CACHE_DIR=str(cache), PYTHONUNBUFFERED="1")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    os.environ.pop("TRITON_INTERPRET", None)
    if not chosen.dry_run and subprocess.run([sys.executable, "-c", DEVICE], check=False).returncode:
        sys.exit(1)
    if kernels := os.environ.get("KERNELS"):
        with tarfile.open(kernels) as archive:
            archive.extractall(cache, filter="data")
    plan = [[dry(part) for part in parts] for parts in PLANS[chosen.call]] if chosen.dry_run else PLANS[chosen.call]
    sys.exit(perform(chosen.call, plan, results, SECONDS))


def dry(part: Part) -> Part:
    """The same part where there is no GPU."""
    return part if part.command[0] == "-m" else part._replace(command=(*part.command, "--dry-run"))


def perform(call: str, plan: Plan, results: Path, seconds: float) -> int:
    """Run the parts within `seconds`, leaving RESULTS/<call>_call.tar.gz; 1 if any did not end as it should, else 0."""
    out, end = results / f"{call}_call", time.monotonic() + seconds
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    ends: list[End] = []
    for parts in plan:
        ends += _side_by_side(parts, out, end)
        (out / "parts.json").write_text(json.dumps([part._asdict() for part in ends], indent=1) + "\n", "utf-8")
        _pack(out)
    shutil.rmtree(out)
    bad = [part for part in ends if part.ended != "well"]
    print(f"{call}: {len(ends) - len(bad)} of {len(ends)} parts ended well; {out}.tar.gz has everything")
    for part in bad:
        print(f"{part.name}: {part.ended}")
    return int(bool(bad))


def _side_by_side(parts: list[Part], out: Path, end: float) -> list[End]:
    """One round."""
    began, running = time.monotonic(), []
    if end <= began:
        return [End(part.name, "never begun: no time was left", 0.0) for part in parts]
    for part in parts:
        seconds = round(min(part.seconds, end - began) - FINISH)
        command = [sys.executable, *(word.format(out=out, seconds=seconds) for word in part.command)]
        for report in (word.split("=")[1] for word in command if word.startswith("--junitxml=")):
            Path(report).touch()  # stays empty if time runs out
        with (out / f"{part.name}.log").open("wb") as log:
            environment = {**os.environ, **part.environment}
            running.append(
                subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
                )
            )
    ends = []
    for part, process in zip(parts, running, strict=True):
        ended = _wait(process, min(began + part.seconds, end) - time.monotonic())
        ends.append(End(part.name, ended, round(time.monotonic() - began, 1)))
        tail = (out / f"{part.name}.log").read_text("utf-8", "replace")[-TAIL * (1 if ended == "well" else 2) :]
        print(
            f"== {part.name}: {ended} after {ends[-1].seconds:.0f} s\n{tail if len(parts) < 4 or ended != 'well' else ''}"
        )
    return ends


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """How it ended; it and what it has started are killed when time is up."""
    try:
        status = process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time: killed, what it had written is kept"
    return "well" if status == 0 else f"exit status {status}"


def _pack(out: Path) -> None:
    """Anew, and in one move: a call that is cut off leaves the archive of the round before."""
    archive = out.with_suffix(".tar.gz")
    part = archive.with_suffix(".part")
    with tarfile.open(part, "w:gz") as file:
        file.add(out, arcname=out.name)
    part.replace(archive)


if __name__ == "__main__":
    main()
