"""Sweeps: each job's result is one file named by all that it depends on, so a sweep that was stopped goes on where it was.

Hydra makes the jobs and its launchers run them, here or on other machines; what is said here is what a job does, and the
table when all are done. A job that failed is tried again when the same command is given again; one whose combination the
library refuses is done, with the reason as its result.
"""

from __future__ import annotations

import hashlib
import json
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from experiments.bench.measure import AGAIN, Refused
from experiments.bench.report import MARKED, cells, interval, markdown
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
    whole.models = {"draft": "draft", "heads": "heads"}
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


def settings(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and values of the command line."""
    return [(key.lstrip("+"), value) for key, _, value in (text.partition("=") for text in overrides)]


def shown(config: DictConfig) -> dict[str, str]:
    """What tells jobs apart: the choice of every group, and what else the command line says."""
    hydra = HydraConfig.get()
    found = {group: hydra.runtime.choices[group] for group in SHOWN} | dict(settings(hydra.overrides.task))
    without = {"sweep", "log", *unused(config)}
    return {key: without_folders(value) for key, value in found.items() if key.split(".")[0] not in without}


class Progress(Callback):
    """Counts the jobs of a sweep, and shows what they came to."""

    keys: Sequence[str] = ()  # what varies; nothing in a single run

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*given, *config.hydra.overrides.task])
        swept = [override for override in parsed if override.is_sweep_override()]
        self.keys = [override.get_key_element() for override in swept]
        self.jobs = math.prod(len(list(override.sweep_iterator())) for override in swept)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self.keys:
            called = " ".join(
                f"{key}={value}" for key, value in settings(config.hydra.overrides.task) if key in self.keys
            )
            print(f"[{config.hydra.job.num + 1}/{self.jobs}] {called}: {job_return.return_value}", flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
        print(f"\n{table(results)}\n\n{folder}")
        if failed := sum("failed" in result for result in results):
            raise SystemExit(f"{failed} of {len(results)} jobs failed: the same command tries them again.")


def table(results: list[dict[str, Any]]) -> str:
    """What all jobs share, and every method of every job over its first, as markdown."""
    keys = list(dict.fromkeys(key for result in results for key in result["settings"]))
    values = {key: [result["settings"].get(key, "-") for result in results] for key in keys}
    varied = [key for key in keys if len(set(values[key])) > 1]
    shared = [f"{key}={values[key][0]}" for key in keys if key not in varied]
    measured = [result for result in results if "figures" in result]
    made = sorted({f"commit {result['commit']} on {result['gpu'] or result['cpu']}" for result in measured})
    rows = [
        [*(result["settings"].get(key, "-") for key in varied), *row]
        for result in sorted(results, key=lambda result: [result["settings"].get(key, "") for key in varied])
        for row in _rows(result)
    ]
    head = [*varied, "method", "speed-up (95 % CI)", "noise floor", "divergence", "acceptance length", "= transformers"]
    return f"{'; '.join([' '.join(shared), *made])}\n\n{markdown([head, *rows])}\n\n{MARKED}"


def _rows(result: dict[str, Any]) -> list[list[str]]:
    if "figures" not in result:
        return [["-", _outcome(result).replace("\n", " ").replace("|", "\\|"), "-", "-", "-", "-"]]
    noise = interval(result["figures"][AGAIN]["speed_up"], digits=2)
    rows = [
        [name, interval(row["speed_up"], digits=2), noise, *cells(row, "divergence", "acceptance_length", "identical")]
        for name, row in _methods(result).items()
    ]
    return rows + [[name, why, "-", "-", "-", "-"] for name, why in result.get("absent", {}).items()]


def _methods(result: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(result["figures"]))
    return {name: row for name, row in result["figures"].items() if name not in (first, AGAIN)}


def _outcome(result: dict[str, Any]) -> str:
    for verdict in ("refused", "failed"):
        if verdict in result:
            return f"{verdict}: {result[verdict]}"
    speeds = {name: interval(row["speed_up"], digits=2) for name, row in _methods(result).items()}
    return ", ".join(f"{name} {speed}" for name, speed in speeds.items())
