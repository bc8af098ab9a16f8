"""Every Python block of the README runs as it stands; the README of the experiments names what there is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.strip().splitlines()[0])
def test_readme_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(block, scope)
    drafters = [scope[name]() for name in ("RepeatLast", "Stutter") if name in scope]
    if drafters:  # those of the README are exact too
        from specdec.rules import SiblingRejection
        from specdec.testing import assert_lossless

        assert_lossless(SiblingRejection(), drafters=drafters)


def test_readme_of_experiments_names_every_script_and_no_other():
    folder = ROOT / "experiments"
    text = (folder / "README.md").read_text("utf-8")
    named = re.findall(r"experiments/[\w/]+\.py", text)
    assert all((ROOT / name).is_file() for name in named)
    assert all(script.name in text for script in folder.glob("*.py"))
