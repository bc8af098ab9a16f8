"""Sweeps: each job's result is one file named by all that it depends on, so a sweep that was stopped goes on where it was.

Hydra makes the jobs and its launchers run them, here or on other machines; what is said here is what a job does, and the
table when all are done. A job that failed is tried again when the same command is given again; one whose combination the
library refuses is done, with the reason as its result.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.bench.measure import AGAIN, Refused
from experiments.bench.progress import settings
from experiments.bench.report import interval
from experiments.bench.results import Json, without_folders

PARTS = ("drafter", "tree", "rule")  # groups that are measured only as parts of methods
SHOWN = ("target", *PARTS, "sampling", "task")


def job(config: DictConfig, compare: Callable[..., tuple[Any, dict[str, Any]]]) -> str:
    """Run one job of a sweep unless it is done; returns what it came to."""
    path = Path(HydraConfig.get().sweep.dir) / f"{identity(config)}.json"
    given = {key.split(".")[0] for key, _ in settings(HydraConfig.get().overrides.task)}
    idle = "".join(f"; no method takes a {part}" for part in unused(config) if part in given)
    if path.exists() and "failed" not in (known := json.loads(path.read_text("utf-8"))):
        return f"known, {_outcome(known)}{idle}"
    result: dict[str, Any] = {"settings": shown(config)}
    if "path" in config.log:
        config.log.path = str(path.with_suffix(Path(config.log.path).suffix))
    try:
        log, found = compare(config, list)  # where a single run keeps whole rounds at Ctrl-C, a job begins anew
        log.write({**result, **found})
        result |= found
    except Refused as error:
        result["refused"] = str(error)
    except (Exception, SystemExit) as error:
        result |= {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    Json(str(path)).write(result)
    return _outcome(result) + idle


def identity(config: DictConfig) -> str:
    """The same for two configurations if they measure the same; another for every change of what is measured."""
    whole = OmegaConf.create(OmegaConf.to_container(config))  # type: ignore[arg-type] - of dictionaries only
    whole.models = {name: name for name in ("target", "draft", "heads")}
    options: Any = OmegaConf.to_container(whole, resolve=True)
    measured = {key: value for key, value in options.items() if key not in (*PARTS, "log", "models")}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]


def used(config: DictConfig) -> str:
    """The methods and the parts they take, as text."""
    text = str(OmegaConf.to_container(config.methods))
    for part in PARTS:  # a drafter may take a tree
        if f"${{{part}}}" in text:
            text += str(OmegaConf.to_container(config[part]))
    return text


def unused(config: DictConfig) -> list[str]:
    """Parts that no method takes, as an n-gram drafter takes no tree."""
    return [part for part in PARTS if f"${{{part}}}" not in used(config)]


def shown(config: DictConfig) -> dict[str, str]:
    """What tells jobs apart: the choice of every group, and what else the command line says."""
    hydra = HydraConfig.get()
    found = {group: hydra.runtime.choices[group] for group in SHOWN} | dict(settings(hydra.overrides.task))
    without = {"sweep", "log", *unused(config)}
    return {key: without_folders(value) for key, value in found.items() if key.split(".")[0] not in without}


def _methods(result: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(result["figures"]))
    return {name: row for name, row in result["figures"].items() if name not in (first, AGAIN)}


def _outcome(result: dict[str, Any]) -> str:
    for verdict in ("refused", "failed"):
        if verdict in result:
            return f"{verdict}: {result[verdict]}"
    speeds = {name: interval(row["speed_up"], digits=2) for name, row in _methods(result).items()}
    return ", ".join(f"{name} {speed}" for name, speed in speeds.items())
