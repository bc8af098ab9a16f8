"""Where specdec keeps files between runs: `$SPECDEC_CACHE`, or `specdec` in `$XDG_CACHE_HOME` or in `~/.cache`."""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

import torch


def cache_folder() -> Path:
    """The folder, which need not be there."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "specdec")


def compiled_folder() -> Path | None:
    """The folder of compiled code, which is for one version of torch and one kind of processor. Files are named by content.

    None where compilers cannot keep any there, which is said once.
    """
    try:
        folder = cache_folder().absolute() / "compiled" / f"torch-{torch.__version__}-{_processor()}"
        _check(folder)
    except (OSError, RuntimeError) as error:  # the latter without a home folder
        _say(f"Compiled code is kept in torch's own folder: {error}; SPECDEC_CACHE may name another one.")
        return None
    return folder


@cache
def _check(folder: Path) -> None:
    """Raise OSError if no code can be compiled in a folder."""
    if " " in str(folder):
        raise OSError(f"compilers take no path with a space, as in {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


@cache
def _say(what: str) -> None:
    warnings.warn(what, stacklevel=3)


def _processor() -> str:
    """What stands for the instructions that this machine's processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    except OSError:  # no Linux
        found = [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(repr(found).encode()).hexdigest()[:8]}"
