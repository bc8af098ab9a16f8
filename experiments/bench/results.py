"""What produced a figure, and where it is kept: enough to produce it again, and nothing about whose machine it was."""

from __future__ import annotations

import csv
import json
import platform
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from experiments.bench.calls import leads
from specdec import Generation, display

ROOT = Path(__file__).resolve().parents[2]


def provenance(script: str, overrides: list[str], options: Any, device: str) -> dict[str, Any]:
    """Command, options, commit, versions, hardware and date; of the paths in them only the last part."""
    changes = _git("status", "--porcelain")
    return {
        "command": shlex.join(["python", script, *map(without_folders, overrides)]),
        "options": json.loads(without_folders(json.dumps(options))),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("specdec", "torch", "transformers", "numpy")},
        },
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A file to write that becomes `path` when it is complete, so that at no time there is half of one, if this process
    leads, and is thrown away otherwise.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        part = Path(folder, path.name)
        yield part
        if leads():
            part.replace(path)


@dataclass(frozen=True)
class Json:
    """One JSON file."""

    path: str

    def write(self, result: dict[str, Any]) -> str:
        """Returns where it is."""
        with whole(self.path) as path:
            path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        return self.path


def keep_settings(folder: Path, settings: dict[str, Any], begun: bool = True) -> None:
    """Write down what a folder is made with; exit if it was `begun` otherwise."""
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if not path.exists() or not begun:
        Json(str(path)).write(settings)
    there = json.loads(path.read_text("utf-8"))
    differing = [key for key in {**there, **settings} if there.get(key) != settings.get(key)]
    if differing:
        raise SystemExit(
            f"{path} is of a run with other settings ({', '.join(differing)}): choose another folder, or delete this file "
            "and the results beside it."
        )


@dataclass(frozen=True)
class Csv:
    """One CSV file: a row for every entry of the figures, with the command, commit and date that it comes from."""

    path: str

    def write(self, result: dict[str, Any]) -> str:
        """Returns where it is."""
        source = {key: result[key] for key in ("command", "commit", "date")}
        figures = result["figures"]
        named = figures.items() if isinstance(figures, dict) else enumerate(figures)
        rows = [{"name": name, **_flat(row), **source} for name, row in named]
        with whole(self.path) as path, open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        return self.path


@dataclass(frozen=True)
class Nothing:
    """Nothing is kept, wherever other logs would keep it."""

    path: str | None = None

    def write(self, result: dict[str, Any]) -> str:
        """Returns that."""
        return "The result is not kept (log=none)."


@dataclass(frozen=True)
class Wandb:
    """One Weights & Biases run.

    The figures are its summary, acceptance by depth and the history its curves, the whole result is an artifact, and
    everything else is its configuration. Of every method in `runs`, recorded with trace="laws", the trees of the first
    prompt are shown, and all traces are another artifact.
    """

    project: str
    mode: Literal["offline", "online", "disabled"] = "offline"
    dir: str = "outputs"
    runs: dict[str, Generation] = field(default_factory=dict)  # by method; for the experiment to fill

    def write(self, result: dict[str, Any]) -> str:
        """Returns where it is."""
        if not leads():
            return self.dir
        import wandb

        Path(self.dir).mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in result.items() if key not in ("figures", "history")}
        with wandb.init(project=self.project, mode=self.mode, dir=self.dir, config=config) as run:
            for name, rows in result.get("history", {}).items():
                for row in rows:
                    run.log({f"{name}/{key}": value for key, value in row.items()})
            run.define_metric("depth")
            run.define_metric("acceptance_rate/*", step_metric="depth")
            for row in acceptance_by_depth(result["figures"]):
                run.log(row)
            run.summary.update({"figures": result["figures"]})
            artifact = wandb.Artifact("result", "result")
            with artifact.new_file("result.json", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
            run.log_artifact(artifact)
            if self.runs:
                run.log({f"trees/{name}": wandb.Html(trees(out)) for name, out in self.runs.items()})
                run.log_artifact(self._traces(wandb.Artifact("traces", "trace")))
            return run.url or run.dir

    def _traces(self, artifact: Any) -> Any:
        with TemporaryDirectory() as folder:
            for name, out in self.runs.items():
                out.trace.save(Path(folder, f"{name}.safetensors"))
            artifact.add_dir(folder)
        return artifact


def trees(out: Generation) -> str:
    """HTML: the draft trees of the first text, step by step."""
    rows = [(step, step.row(0)) for step in out.trace.steps]
    steps = [step for step, row in rows if row is not None and step.emitted[row]]
    return "".join(display.tree(step, 0, out.tokenizer)._repr_html_() for step in steps)


def acceptance_by_depth(figures: Any) -> list[dict[str, float]]:
    """For each depth, the acceptance rate of every method that drafts so deep."""
    named = figures.items() if isinstance(figures, dict) else ()
    rates = {name: row.get("acceptance_rate", []) for name, row in named if isinstance(row, dict)}
    return [
        {"depth": depth + 1, **{f"acceptance_rate/{name}": of[depth] for name, of in rates.items() if depth < len(of)}}
        for depth in range(max(map(len, rates.values()), default=0))
    ]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """`{"speed_up": {"low": 1}}` as `{"speed_up.low": 1}`; lists stay in one cell."""
    if not isinstance(value, dict):
        return {key or "value": value}
    return {name: v for k, child in value.items() for name, v in _flat(child, f"{key}.{k}" if key else str(k)).items()}


def without_folders(text: str) -> str:
    """`target.target=/home/me/model` without `/home/me/`."""
    return re.sub(r"(^|[=\[,'\"])~?/(?:[^/,'\"]*/)*", r"\1", text)


def _git(*arguments: str) -> str | None:
    """What git prints; None outside a checkout or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
