"""What tests of several files ask for."""

import runpy
import sys
import weakref
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from transformers.utils import logging

from specdec.models.cache import TreeCache

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script as a user does; returns what it printed, and the message it ended with if there is one."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, script: str = "benchmark.py") -> tuple[str, str | None]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", [script, *overrides])
        monkeypatch.delitem(sys.modules, f"experiments.{script.removesuffix('.py')}", raising=False)  # imported anew
        ended = None
        try:
            runpy.run_path(str(EXPERIMENTS / script), run_name="__main__")
        except SystemExit as error:
            ended = str(error) if error.code else None
        GlobalHydra.instance().clear()
        return capsys.readouterr().out, ended

    yield run
    logging.enable_progress_bar()


@pytest.fixture
def caches(monkeypatch):
    """Weak references to all caches that are made."""
    found, made = [], TreeCache.__init__

    def noting(self, *args):
        made(self, *args)
        found.append(weakref.ref(self))

    monkeypatch.setattr(TreeCache, "__init__", noting)
    return found
