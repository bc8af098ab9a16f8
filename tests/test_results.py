"""Published results say how they were made: by a commit, from a clean tree, with a command that is still there."""

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Scripts that results were made with, at the commits that they name, and what has taken their places.
REPLACED = {
    **{f"experiments/train_{kind}.py": "experiments/train_drafter.py" for kind in ("eagle3", "medusa")},
    **{f"experiments/{name}.py": f"experiments/studies/{name}.py" for name in ("hot_paths", "simulate")},
    **{f"experiments/{name}.py": "specdec/tuning/tune.py" for name in ("calibrate_tree", "search_skip")},
}
RESULTS = ROOT / "experiments" / "results"
FILES = [pytest.param(file, id=file.stem) for file in sorted(RESULTS.rglob("*.json"))]


def source(file: Path) -> dict:
    """Where a result comes from: it says so itself, or another file beside it does."""
    beside = file.with_name(f"{file.stem}_provenance.json")
    return json.loads((beside if beside.exists() else file).read_text("utf-8"))


def script(command: str) -> Path:
    """The script that a command runs, by its path or as a module."""
    python, *words = shlex.split(command)
    assert python == "python"
    path = f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0]
    return ROOT / REPLACED.get(path, path)


@pytest.mark.parametrize("file", FILES)
def test_result_names_a_commit_a_clean_tree_and_a_script_that_is_there(file):
    made = source(file)
    assert re.fullmatch(r"[0-9a-f]{40}", made["commit"])
    assert made["dirty"] is False
    assert script(made["command"]).is_file()
