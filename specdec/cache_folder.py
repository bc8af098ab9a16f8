"""Where specdec keeps files between runs: `$SPECDEC_CACHE`, or `specdec` in `$XDG_CACHE_HOME` or in `~/.cache`."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import torch


def cache_folder() -> Path:
    """The folder, which need not be there."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "specdec")


def compiled_folder() -> Path:
    """The folder of compiled code, which is for one version of torch and one kind of processor. Files are named by content."""
    return cache_folder() / "compiled" / f"torch-{torch.__version__}-{_processor()}"


def _processor() -> str:
    """What stands for the instructions that this machine's processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    except OSError:  # no Linux
        found = [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(repr(found).encode()).hexdigest()[:8]}"
