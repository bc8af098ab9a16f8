"""What can be known of the benchmark without a GPU: floors, rivals, the refusal and the report."""

import json
import re
import sys
import time
import types
from importlib.metadata import version

import baselines
import bench_recurrences
import bench_stored_linear
import bench_tree_attention as bench
import bench_verify
import floors
import meter
import processes
import pytest
import report
import smoke
import torch
import verification
from torch.nn.attention import SDPBackend

torch.set_num_threads(1)

SMALL = floors.Shape("small", 4, 2, 16, 5, 140, 2)
H200 = floors.RATES["NVIDIA H200"]
RIVALS = {
    "transformers sdpa": baselines.transformers_sdpa,
    "sdpa math": lambda arguments: baselines.sdpa(SDPBackend.MATH, arguments),
    "flex": lambda arguments: baselines.flex(arguments, compiled=False),
    "flash + tree + merge": baselines.flash_then_tree,
    "specdec": bench.candidates()["specdec"],
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_compute_the_same(name):
    arguments = bench.inputs(SMALL, "cpu", seed=0)
    assert bench.error(RIVALS[name](arguments), arguments) < bench.TOLERANCE


def test_a_wrong_rival_is_not_timed(monkeypatch):
    monkeypatch.setattr(report, "measure", lambda calls, device: report.Timing(1e-5, 0.0))
    rivals = {"right": RIVALS["sdpa math"], "wrong": lambda _: lambda a: a["query"].transpose(1, 2)}
    monkeypatch.setattr(bench, "BASELINES", rivals)
    for method in ("specdec", "right"):
        assert bench.figures(SMALL, method, "cpu")["us"] == pytest.approx(10)
    with pytest.raises(RuntimeError, match="wrong: error"):
        bench.figures(SMALL, "wrong", "cpu")


TREES = {"batch": 6, "nodes": 9, "vocab": 60, "width": 3}
VERIFICATION = [
    floors.Compaction("compact", 3, layers=2, kv_heads=2, head_dim=4, kept=4),
    *(floors.Laws("law", sampling, "", **TREES) for sampling in verification.SAMPLINGS),
    *(floors.Laws("verify", s, c, **TREES) for s, c in (("greedy", "POINT"), ("top-k", "SAMPLED_THEN_TOP"))),
    *(floors.Laws("verify", "top-p", children, **TREES) for children in ("IID", "WITHOUT_REPLACEMENT")),
]


@pytest.mark.parametrize("shape", VERIFICATION, ids=str)
def test_rivals_of_verification_compute_the_same(shape):
    turns = bench_verify.buffers(shape, "cpu")
    calls = verification.candidates(shape)
    assert len(calls) >= 2
    for name, call in calls.items():
        assert verification.fault(shape, call, turns) is None, name


WRONG = {
    "law": lambda logits, *filters: verification.probabilities(logits * 1.01, *filters),
    "verify": lambda *arguments: verification.walk_in_torch(*arguments[:12], lenience=0.3),
    "compact": lambda *arguments: None,
}


@pytest.mark.parametrize("op", WRONG)
def test_wrong_verification_is_not_timed(op, monkeypatch):
    shape = next(s for s in reversed(VERIFICATION) if s.op == op)
    monkeypatch.setattr(report, "measure", lambda calls, device: report.Timing(1e-5, 0.0))
    monkeypatch.setattr(verification, "candidates", lambda shape: {"right": right, "wrong": WRONG[op]})
    right = getattr(verification.specdec_kernels, op)
    assert bench_verify.figures(shape, "right", "cpu")["us"] == pytest.approx(10)
    with pytest.raises(RuntimeError, match="wrong"):
        bench_verify.figures(shape, "wrong", "cpu")


@pytest.mark.parametrize("shape", bench_recurrences.DRY, ids=str)
def test_rivals_of_recurrences_compute_the_same_and_wrong_ones_are_not_timed(shape, monkeypatch):
    monkeypatch.setattr(report, "measure", lambda calls, device: report.Timing(1e-5, 0.0))
    for name in bench_recurrences.candidates(shape):
        assert bench_recurrences.figures(shape, name, "cpu")["us"] == pytest.approx(10)
    right = bench_recurrences.candidates(shape)["torch"]
    wrong = {"torch": right, "wrong": lambda *x: right(*x[:-1], torch.ones_like(x[-1]))}  # one node is kept, not two
    monkeypatch.setattr(bench_recurrences, "candidates", lambda shape: wrong)
    with pytest.raises(RuntimeError, match=r"wrong: .* off by"):
        bench_recurrences.figures(shape, "wrong", "cpu")


@pytest.mark.parametrize("shape", bench_stored_linear.DRY, ids=str)
def test_rivals_of_stored_products_compute_the_same_and_wrong_ones_are_not_timed(shape, monkeypatch):
    monkeypatch.setattr(report, "measure", lambda calls, device: report.Timing(1e-5, 0.0))
    right = bench_stored_linear.prepared
    for method in bench_stored_linear.TOLERANCE:
        monkeypatch.setattr(bench_stored_linear, "prepared", right)
        assert bench_stored_linear.figures(shape, method, "cpu")["us"] == pytest.approx(10)
        monkeypatch.setattr(bench_stored_linear, "prepared", lambda *a: lambda: 1.03 * right(*a)())
        with pytest.raises(RuntimeError, match=r"wrong: result off by"):
            bench_stored_linear.figures(shape, method, "cpu")


def test_floors_are_those_of_the_slowest_resource():
    by_hand = {
        (64, 1024): 1.44,
        (64, 8192): 11.0,
        (64, 131072): 174,
        (16, 32768): 31,
    }  # microseconds, mma but for the last
    for (nodes, length), microseconds in by_hand.items():
        found = floors.floor(floors.Shape("", 32, 8, 128, nodes, length, 1), H200) * 1e6
        assert found == pytest.approx(microseconds, rel=0.03)
    laws = floors.Laws("law", "temperature", "", 1)
    assert floors.floor(laws, H200) * 1e6 == pytest.approx(3.8, rel=0.03)
    trees = floors.Laws("verify", "temperature", "IID", 1)
    assert (trees.internal, trees.depth) == (16, 3) and trees.bytes - laws.bytes == 16 * 128256 * 4
    assert floors.Shape("", 16, 8, 256, 64, 8192, 1, window=4096).seen == 4096 + 64
    states = floors.Recurrence("fold_linear_attention", 32, nodes=0, kept=0)  # of a layer of Qwen3-Next-80B
    assert states.bytes == 32 * 2 * 32 * 128 * 128 * 4 and floors.floor(states, H200) * 1e6 == pytest.approx(
        31, rel=0.03
    )


def test_every_shape_is_asked_for_once():
    for shapes, least in (
        (list(bench.shapes()), 40),
        (list(bench_verify.shapes()), 20),
        (list(bench_recurrences.shapes()), 10),
    ):
        assert len(set(shapes)) == len(shapes) and len(shapes) > least


def test_red_tests_are_listed_and_so_are_those_that_did_not_end(tmp_path):
    passed = '<testcase name="a"/>'
    failed, skipped = (f'<testcase name="{n}"><{end}/></testcase>' for n, end in (("b", "failure"), ("c", "skipped")))
    for name, cases in (("verify.1", passed + failed), ("verify.2", skipped), ("law.1", passed)):
        (tmp_path / f"{name}.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    (tmp_path / "law.2.xml").touch()
    (tmp_path / "law.3.xml").write_text('<testsuites><testsuite><testcase name="a"/')
    assert report.red(tmp_path, "verify") == ["verify: b (failure)", "verify: c (skipped)"]
    assert report.red(tmp_path, "law", "compact") == ["law.2 did not end", "law.3 did not end", "compact: none ran"]


def test_the_first_cause_of_a_failure_is_in_its_reason():
    def failing():
        try:
            raise ValueError("the cause")
        finally:
            raise RuntimeError("on the way out")

    with pytest.raises(RuntimeError) as caught:
        failing()
    assert report.reason(caught.value) == "RuntimeError: on the way out; before that ValueError: the cause"


DYING = """
import argparse, json, os, sys
options = argparse.ArgumentParser()
for name in ("start", "rows", "seconds"):
    options.add_argument("--" + name)
chosen = options.parse_args()
for i in range(int(chosen.start), 4):
    if i == 1:
        os.abort()
    with open(chosen.rows, "a") as file:
        file.write(json.dumps({"us": i}) + "\\n")
    if i == 2:
        sys.exit(3)
"""


def test_a_process_that_dies_costs_one_shape(tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    rows = processes.rows_of([str(tmp_path / "dying.py")], 4, 60)
    assert [row.get("us") for row in rows] == [0, None, 2, 3]
    assert rows[1]["reason"] == "the process died: killed by SIGABRT"


def test_what_time_does_not_suffice_for_has_no_row():
    assert processes.rows_of(["never started"], 4, 0) == []


def test_the_load_is_read_while_the_work_is_done(monkeypatch):
    monkeypatch.setattr(meter, "read", lambda: (1980, 700.0, 60))
    with meter.LoadMeter("cuda") as entered:
        time.sleep(10 * meter.EVERY)
    assert entered.columns() == {"SM MHz": 1980, "W": 700.0, "deg C": 60}
    monkeypatch.setattr(meter, "read", lambda: 1 / 0)
    with meter.LoadMeter("cuda") as entered:
        time.sleep(10 * meter.EVERY)
    assert entered.columns() == {"load": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize("method", smoke.OPS)
def test_smoke_checks_launches_and_replays(method):
    for shape in smoke.shapes_of(method, dry=True):
        assert smoke.figures(shape, method, "cpu")["us"] > 0


def test_smoke_finds_a_replay_that_does_not_read_its_inputs(monkeypatch):
    def stale(call, device):
        outputs = call()
        return lambda: outputs

    monkeypatch.setattr(report, "captured", stale)
    for method in ("tree_attention", "law"):
        with pytest.raises(RuntimeError, match="wrong when replayed"):
            smoke.figures(smoke.shapes_of(method, dry=True)[0], method, "cpu")


def test_versions_need_no_metadata_of_a_distribution(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    assert report.provenance()["versions"]["triton"] == "3.6.0"
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    assert report.provenance()["versions"]["triton"] is None


def test_the_report_holds_figures_and_what_produced_them(tmp_path):
    rows = [{"method": "specdec", "us": 12.3456}, {"method": "flex", "reason": "refused"}]
    path = report.write(rows, report.provenance(), tmp_path, "kernels_{gpu}_{date}_tree_attention")
    stored = json.loads(path.read_text())
    assert path.name.startswith("kernels_no_gpu_") and path.name.endswith("_tree_attention.json")
    assert stored["rows"] == rows and stored["versions"]["torch"] == version("torch") and stored["gpu"] == "no GPU"
    table = path.with_suffix(".md").read_text()
    assert re.search(r"\| method \| us \| reason \|\n.*\n\| specdec \| 12.3 \|  \|\n\| flex \|  \| refused \|", table)
