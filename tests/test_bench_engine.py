"""The benchmarks of whole steps and of the LM head, on models as small as the demo's and without a GPU."""

import argparse
import json
from types import SimpleNamespace

import bench_engine
import bench_head
import processes
import pytest
import torch


@pytest.fixture
def here(monkeypatch):
    """A method's process is this one."""

    def rows_of(command, count, seconds):
        options = dict(zip(command[1::2], command[2::2], strict=False))
        case = bench_engine.Case(*(int(x) if x.isdigit() else x for x in options["--cases"].split(",")))
        return [bench_engine.figures(case, options["--method"], "cpu", 10)]

    monkeypatch.setattr(processes, "rows_of", rows_of)


def run(tmp_path, case, engines, few=False):
    chosen = argparse.Namespace(
        seconds=600, dry_run=True, engines=engines, few=few, new_tokens=10, results=tmp_path, method=None
    )
    bench_engine.run_all([case], chosen)
    (written,) = (path for path in tmp_path.glob("engine_*.json") if "profile" not in path.name)
    return {row["method"]: row for row in json.loads(written.read_text("utf-8"))["rows"]}


def test_every_method_has_its_figures(tmp_path, here):
    rows = run(tmp_path, bench_engine.DRY[0], ["graph"])
    assert len(rows) == 6 + 2
    for drafter in ("small draft", "Medusa heads"):
        assert rows[f"{drafter}, chain of 4, graph"]["acceptance length"] > 1
    assert all(row["verify / weight floor"] > 0 and row["tokens/s"] > 0 for row in rows.values())
    assert rows["autoregressive, graph"]["speed-up"] == 1


def test_random_weights_verify_trees_of_which_nothing_is_accepted(tmp_path, here):
    rows = run(tmp_path, bench_engine.DRY[1], ["eager"])
    assert [*rows] == ["autoregressive, eager", *(f"tree of {n} nodes, eager" for n in bench_engine.NODES)]
    assert all(row["acceptance length"] == pytest.approx(1, abs=0.3) for row in rows.values())


def test_speed_is_by_the_clock_of_the_host_without_the_prefill():
    trace = SimpleNamespace(prefill_seconds=3.0)
    out = SimpleNamespace(trace=trace, summary=lambda: {"tokens": 40, "tokens_per_second": 1e9})
    assert bench_engine.Timed(out, 5.0).speed == 20


def test_a_method_without_time_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "rows_of", lambda command, count, seconds: [])
    rows = run(tmp_path, bench_engine.DRY[0], ["eager"], few=True)
    assert {row["reason"] for row in rows.values()} == {"left out for want of time"}


def test_a_profile_lists_the_kernels_that_take_most():
    events = [SimpleNamespace(name=name, device_time=time) for name, time in [("a", 40), ("b", 8), ("a", 40)]]
    top, second, others = bench_engine.by_kernel(events)
    assert (top["kernel"], top["us"], second["us"], others["us"]) == ("a", 20, 2, 0)


def test_every_part_of_a_large_head_has_its_time():
    greedy = [shape for shape in bench_head.shapes_of("specdec", dry=True) if shape.sampling == "greedy"]
    assert [shape.nodes for shape in greedy] == [1, 16, 64]
    for row in (bench_head.figures(shape, "specdec", "cpu") for shape in greedy):
        assert all(row[f"{part} us"] > 0 for part in ("head", "law", "verify", "together"))
        assert row["together, % of floor"] == pytest.approx(100 * row["weight floor us"] / row["together us"])


def test_a_target_of_the_shape_of_llama_3_has_its_weights():
    from llama import llama3

    assert sum(p.numel() for p in llama3("meta", torch.bfloat16).parameters()) == 8_030_261_248
