"""What needs a GPU, in three calls of at most nine minutes each: `make gpu-smoke`, then `make gpu`, then `make engine`.

    python experiments/gpu.py smoke        python experiments/gpu.py smoke --dry-run

Needs torch >= 2.11 with CUDA, triton >= 3.6, transformers >= 5.17, pytest and this checkout; no network, no git, and nothing
is installed. A call runs its parts in processes (experiments/bench/parts.py), each with a limit of time, and whatever becomes
of them leaves one archive, RESULTS/<call>_call.tar.gz, packed anew after every round and every half minute: tables, logs, JUnit
reports, and parts.json, which says how each part ended. Environment:

    RESULTS=folder            of the archive; experiments/results by default
    COMMIT=name               what was checked out, where there is no git
    TRITON_CACHE_DIR=folder   compiled kernels, for all calls; outputs/triton by default
    KERNELS=archive.tar.gz    kernels compiled beforehand (kernels/tools/precompile.py), unpacked there first
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # nothing is installed

from experiments.bench.parts import ROOT, Part, perform

SECONDS = 535  # that a call may take
NEEDED = ("torch", "triton", "transformers", "pytest")
DEVICE = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def bench(name: str, limit: float, *options: str) -> list[Part]:
    """A round of one benchmark, which begins nothing in its last `parts.FINISH` seconds."""
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


PLANS: dict[str, list[list[Part]]] = {  # the last part of each takes the time that the others leave
    "smoke": [
        bench("smoke", 170),
        bench("bench_splits", 110),
        bench(
            "bench_engine", SECONDS, "--cases", "8B,1,1024", "Llama-3-8B,1,1024", "--engines", "eager", "graph", "--few"
        ),
    ],
    "gpu": [
        suite(compact=1, law=1, recurrences=1, stored_linear=1, verify=5, graphs=4, tree_attention=5),
        bench("bench_verify", 120, "--tests", "{out}"),
        bench("bench_recurrences", 60, "--tests", "{out}"),
        bench("bench_tree_attention", SECONDS, "--tests", "{out}"),
    ],
    "engine": [bench("bench_head", 90), bench("bench_stored_linear", 60), bench("bench_engine", SECONDS)],
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
    if not chosen.dry_run and (fault := lacking(results, cache) or unpacked(os.environ.get("KERNELS"), cache)):
        sys.exit(f"specdec: {fault}")
    plan = [[dry(part) for part in parts] for parts in PLANS[chosen.call]] if chosen.dry_run else PLANS[chosen.call]
    sys.exit(perform(chosen.call, plan, results, SECONDS))


def lacking(results: Path, cache: Path) -> str:
    """What a call lacks here, in one sentence with its cure; "" if nothing."""
    if sys.version_info < (3, 11):  # noqa: UP036  this file runs with whatever Python there is
        return f"{sys.executable} is Python {sys.version.split()[0]}; 3.11 or later is needed: make PYTHON=/path/to/python ..."
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        return f"{sys.executable} has no {', '.join(missing)}: install them, or name another: make PYTHON=/path/to/python ..."
    for name, folder in (("RESULTS", results), ("TRITON_CACHE_DIR", cache)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            return f"nothing can be written to {folder} ({error.strerror}): name another folder, {name}=..."
    if subprocess.run([sys.executable, "-c", DEVICE], check=False).returncode:
        return "torch sees no GPU here: run this where nvidia-smi lists one, with a CUDA build of torch; --dry-run needs none"
    return ""


def unpacked(kernels: str | None, cache: Path) -> str:
    """Unpack an archive of compiled kernels; why that failed, if it did."""
    try:
        if kernels:
            with tarfile.open(kernels) as archive:
                archive.extractall(cache, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        why = str(error).splitlines()[0]
        return f"KERNELS={kernels} cannot be unpacked ({why}): name what kernels/tools/precompile.py wrote, or none"
    return ""


def dry(part: Part) -> Part:
    """The same part where there is no GPU."""
    return part if part.command[0] == "-m" else part._replace(command=(*part.command, "--dry-run"))


if __name__ == "__main__":
    main()
