"""How far a sweep is. Hydra imports this before the first job, so it imports nothing that takes seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


def settings(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and values of the command line."""
    return [(key.lstrip("+"), value) for key, _, value in (text.partition("=") for text in overrides)]


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
        # here, as they take seconds to import, which the jobs have spent
        swept, sweep_table = (import_module(f"experiments.bench.{name}") for name in ("swept", "sweep_table"))
        print(f"\n{sweep_table.text(swept.sweep(results))}\n\n{folder}")
        if failed := sum("failed" in result for result in results):
            raise SystemExit(f"{failed} of {len(results)} jobs failed: the same command tries them again.")
