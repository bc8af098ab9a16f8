"""What can be known of the benchmark without a GPU: floors, rivals, the refusal and the report."""

import json
import re

import baselines
import bench_tree_attention as bench
import bench_verify
import floors
import pytest
import report
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
    "specdec": bench.candidates(SMALL)["specdec"],
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_compute_the_same(name):
    arguments = bench.inputs(SMALL, "cpu", seed=0)
    assert bench.error(RIVALS[name](arguments), arguments) < bench.TOLERANCE


def test_a_wrong_rival_is_not_timed(monkeypatch):
    monkeypatch.setattr(report, "measure", lambda calls: report.Timing(1e-5, 0.0))
    monkeypatch.setattr(
        bench, "BASELINES", {"right": RIVALS["sdpa math"], "wrong": lambda _: lambda a: a["query"].transpose(1, 2)}
    )
    ours, right, wrong = bench.time_shape(SMALL, [bench.inputs(SMALL, "cpu", seed) for seed in range(2)])
    assert ours["us"] == right["us"] == pytest.approx(10)
    assert "us" not in wrong and wrong["reason"].startswith("wrong: error")


TREES = {"batch": 6, "nodes": 9, "vocab": 60, "width": 3}
VERIFICATION = [
    floors.Compaction("compact", 3, layers=2, kv_heads=2, head_dim=4, kept=4),
    *(floors.Laws("law", sampling, "", **TREES) for sampling in verification.SAMPLINGS),
    *(floors.Laws("verify", s, c, **TREES) for s, c in (("greedy", "POINT"), ("top-k", "SAMPLED_THEN_TOP"))),
    *(floors.Laws("verify", "top-p", children, **TREES) for children in ("IID", "WITHOUT_REPLACEMENT")),
]


@pytest.mark.parametrize("shape", VERIFICATION, ids=str)
def test_rivals_of_verification_compute_the_same(shape, monkeypatch):
    monkeypatch.setattr(bench_verify, "ROTATED", 0)  # as few calls as there may be
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
    monkeypatch.setattr(report, "measure", lambda calls: report.Timing(1e-5, 0.0))
    monkeypatch.setattr(bench_verify, "ROTATED", 0)
    monkeypatch.setattr(verification, "candidates", lambda shape: {"right": right, "wrong": WRONG[op]})
    right = getattr(verification.specdec_kernels, op)
    good, bad = bench_verify.time_shape(shape, bench_verify.buffers(shape, "cpu"))
    assert good["us"] == pytest.approx(10) and "us" not in bad and bad["reason"].startswith("wrong")


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


def test_every_shape_is_asked_for_once():
    for shapes, least in ((list(bench.shapes()), 40), (list(bench_verify.shapes()), 20)):
        assert len(set(shapes)) == len(shapes) and len(shapes) > least


PASSED = '<testcase classname="kernels.tests.gpu.test_tree_attention" name="a"/>'
TESTS = {
    "green": (PASSED, None),
    "red": (PASSED + PASSED.replace("/>", "><failure/></testcase>"), "1 of 3 did not pass"),
    "skipped": (PASSED.replace("/>", "><skipped/></testcase>"), "1 of 2 did not pass"),
    "absent": ("", "none ran"),
}


@pytest.mark.parametrize("outcome", TESTS)
def test_a_kernel_is_timed_only_after_its_tests_passed(outcome, tmp_path):
    cases, message = TESTS[outcome]
    for name, ended in (("verify.1", PASSED), ("law.1", PASSED if cases else ""), ("law.2", cases)):
        (tmp_path / f"{name}.xml").write_text(f"<testsuites><testsuite>{ended}</testsuite></testsuites>")
    if message is None:
        report.require_green(tmp_path, "verify", "law")
    else:
        with pytest.raises(SystemExit, match=message):
            report.require_green(tmp_path, "verify", "law")
    with pytest.raises(SystemExit, match="none ran"):
        report.require_green(tmp_path, "verify", "compact")
    (tmp_path / "verify.2.xml").touch()
    with pytest.raises(SystemExit, match=r"verify\.2 did not end"):
        report.require_green(tmp_path, "verify")


def test_the_report_holds_figures_and_what_produced_them(tmp_path):
    rows = [{"method": "specdec", "us": 12.3456}, {"method": "flex", "reason": "refused"}]
    path = report.write(rows, report.provenance(), tmp_path, "kernels_{gpu}_{date}_tree_attention")
    stored = json.loads(path.read_text())
    assert path.name.startswith("kernels_no_gpu_") and path.name.endswith("_tree_attention.json")
    assert stored["rows"] == rows and stored["versions"]["torch"] == torch.__version__ and stored["gpu"] == "no GPU"
    table = path.with_suffix(".md").read_text()
    assert re.search(r"\| method \| us \| reason \|\n.*\n\| specdec \| 12.3 \|  \|\n\| flex \|  \| refused \|", table)
