"""What produced a figure, and where it is kept: enough to produce it again, and nothing about whose machine it was."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parents[1]


def provenance(script: str, overrides: list[str], options: Any, device: str) -> dict[str, Any]:
    """Command, options, commit, versions, hardware and date; of the paths in them only the last part."""
    changes = _git("status", "--porcelain")
    return {
        "command": shlex.join(["python", script, *map(_without_folders, overrides)]),
        "options": json.loads(_without_folders(json.dumps(options))),
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


@dataclass(frozen=True)
class Json:
    """One JSON file."""

    path: str

    def write(self, result: dict[str, Any]) -> str:
        """Returns where it is."""
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        Path(self.path).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        return self.path


@dataclass(frozen=True)
class Wandb:
    """One Weights & Biases run: the figures as its summary, the history as its curves, everything else as its configuration."""

    project: str
    mode: Literal["offline", "online", "disabled"] = "offline"
    dir: str = "outputs"

    def write(self, result: dict[str, Any]) -> str:
        """Returns where it is."""
        import wandb

        Path(self.dir).mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in result.items() if key not in ("figures", "history")}
        with wandb.init(project=self.project, mode=self.mode, dir=self.dir, config=config) as run:
            for name, rows in result.get("history", {}).items():
                for row in rows:
                    run.log({f"{name}/{key}": value for key, value in row.items()})
            run.summary.update(result["figures"])
            return run.url or run.dir


def _without_folders(text: str) -> str:
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
