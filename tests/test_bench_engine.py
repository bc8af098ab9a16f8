"""The benchmarks of whole steps and of the LM head, on models as small as the demo's and without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_head
import pytest

ROOT = Path(__file__).parents[1]


def test_every_method_has_its_figures(tmp_path):
    command = [sys.executable, ROOT / "kernels/bench/bench_engine.py", "--device", "cpu", "--cases", "tiny,1,40", "--engines",
               "eager", "graph", "--new-tokens", "10", "--results", tmp_path]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    (written,) = tmp_path.glob("engine_*.json")
    rows = {row["method"]: row for row in json.loads(written.read_text("utf-8"))["rows"]}
    assert len(rows) == 6 * 2 + 2
    for drafter in ("small draft", "Medusa heads"):
        eager, graph = (rows[f"{drafter}, chain of 4, {engine}"] for engine in ("eager", "graph"))
        assert eager["acceptance length"] == graph["acceptance length"] > 1
    assert all(row["verify / weight floor"] > 0 and row["tokens/s"] > 0 for row in rows.values())
    assert written.with_suffix(".md").exists()


def test_every_part_of_a_large_head_has_its_time(tmp_path, monkeypatch):
    options = ["--device", "cpu", "--hidden", "32", "--vocab", "300", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_head.py", *options])
    bench_head.main()
    (written,) = tmp_path.glob("head_*.json")
    rows = json.loads(written.read_text("utf-8"))["rows"]
    assert [row["nodes"] for row in rows] == [1, 16, 64] * 3
    for row in rows:
        assert all(row[f"{part} us"] > 0 for part in ("head", "law", "verify", "together"))
        assert row["together, % of floor"] == pytest.approx(100 * row["weight floor us"] / row["together us"])
