"""The three calls for a GPU, with stand-ins for what they launch: order, limits, and what is left behind."""

import json
import os
import sys
import tarfile

import pytest

from experiments import gpu
from experiments.gpu import Part


def code(text):
    return ("-c", text)


def left(tmp_path, call="some"):
    """What the archive holds: file name -> text."""
    with tarfile.open(tmp_path / f"{call}_call.tar.gz") as archive:
        return {os.path.basename(m.name): archive.extractfile(m).read().decode() for m in archive if m.isfile()}


def test_everything_lands_in_one_archive_whatever_becomes_of_the_parts(tmp_path, capfd):
    fails = Part("fails", code("print('before'); 1 / 0"), 60)
    hangs = Part(
        "hangs", ("-c", "import sys, time; print(sys.argv[1], flush=True); time.sleep(60)", "--junitxml={out}/x.xml"), 3
    )
    well = Part("well", code("import os, sys; open(sys.argv[1], 'w').write(os.environ['MARK'])"), 60, {"MARK": "seen"})
    well = well._replace(command=(*well.command, "{out}/table.md"))
    assert gpu.perform("some", [[fails, hangs], [well]], tmp_path, 60) == 1
    assert os.listdir(tmp_path) == ["some_call.tar.gz"]
    found = left(tmp_path)
    ended = {part["name"]: part["ended"] for part in json.loads(found["parts.json"])}
    assert ended == {
        "fails": "exit status 1",
        "hangs": "out of time: killed, what it had written is kept",
        "well": "well",
    }
    assert "before" in found["fails.log"] and "ZeroDivisionError" in found["fails.log"]
    assert "--junitxml" in found["hangs.log"] and found["x.xml"] == ""
    assert found["table.md"] == "seen"
    assert "ZeroDivisionError" in capfd.readouterr().out


def test_what_there_is_no_time_for_is_said(tmp_path):
    slow, late = Part("slow", code("import time; time.sleep(60)"), 50), Part("late", code(""), 50)
    assert gpu.perform("some", [[slow], [late]], tmp_path, 1) == 1
    ended = {part["name"]: part["ended"] for part in json.loads(left(tmp_path)["parts.json"])}
    assert ended["slow"].startswith("out of time") and ended["late"] == "never begun: no time was left"


def test_a_benchmark_is_told_how_long_it_may_begin_something(tmp_path):
    part = Part("told", ("-c", "import sys; print(sys.argv[1:])", "{seconds}"), 500)
    assert gpu.perform("some", [[part]], tmp_path, 100) == 0
    assert left(tmp_path)["told.log"].strip() == f"['{100 - gpu.FINISH}']"


@pytest.mark.parametrize("call", gpu.PLANS)
def test_plans_fit_their_nine_minutes_and_run_what_there_is(call):
    *firsts, last = gpu.PLANS[call]
    assert gpu.SECONDS <= 540
    left = gpu.SECONDS - sum(max(part.seconds for part in parts) for parts in firsts)
    assert left >= 100 and all(part.seconds > gpu.FINISH for parts in firsts for part in parts) and last
    for parts in gpu.PLANS[call]:
        for part in parts:
            scripts = [word for word in part.command if word.endswith(".py")]
            assert scripts and all((gpu.ROOT / script).exists() for script in scripts)


def test_a_dry_run_leaves_the_table_of_a_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "smoke", "--dry-run"])
    monkeypatch.setattr(
        gpu, "PLANS", {"smoke": [parts for parts in gpu.PLANS["smoke"] if parts[0].name == "bench_splits"]}
    )
    for name, value in (("RESULTS", tmp_path), ("COMMIT", "abc"), ("TRITON_CACHE_DIR", tmp_path / "cache")):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0
    found = left(tmp_path, "smoke")
    (table,) = (json.loads(text) for name, text in found.items() if name.endswith("_splits.json"))
    assert table["commit"] == "abc" and [row["splits"] for row in table["rows"]] == [None, 2]
    assert all(row["us"] > 0 for row in table["rows"])
