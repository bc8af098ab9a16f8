"""The engine benchmark, on models as small as the demo's and without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_method_has_its_figures(tmp_path):
    command = [sys.executable, ROOT / "kernels/bench/bench_engine.py", "--device", "cpu", "--cases", "tiny,1,40", "--engines",
               "eager", "graph", "--new-tokens", "10", "--results", tmp_path]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    (written,) = tmp_path.glob("engine_*.json")
    rows = {row["method"]: row for row in json.loads(written.read_text("utf-8"))["rows"]}
    assert len(rows) == 5 * 2 + 2
    eager, graph = (rows[f"small draft, chain of 4, {engine}"] for engine in ("eager", "graph"))
    assert eager["acceptance length"] == graph["acceptance length"] > 1
    assert all(row["verify / weight floor"] > 0 and row["tokens/s"] > 0 for row in rows.values())
    assert written.with_suffix(".md").exists()
