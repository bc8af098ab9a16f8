"""What can be known of the benchmark without a GPU: floors, rivals, the refusal and the report."""

import json
import re

import baselines
import bench_tree_attention as bench
import floors
import pytest
import report
import torch
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
    monkeypatch.setattr(report, "measure", lambda calls: 1e-5)
    monkeypatch.setattr(
        bench, "BASELINES", {"right": RIVALS["sdpa math"], "wrong": lambda _: lambda a: a["query"].transpose(1, 2)}
    )
    ours, right, wrong = bench.time_shape(SMALL, [bench.inputs(SMALL, "cpu", seed) for seed in range(2)])
    assert ours["us"] == right["us"] == pytest.approx(10)
    assert "us" not in wrong and wrong["reason"].startswith("wrong: error")


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
    assert floors.Shape("", 16, 8, 256, 64, 8192, 1, window=4096).seen == 4096 + 64


def test_every_shape_is_asked_for_once():
    shapes = list(bench.shapes())
    assert len(set(shapes)) == len(shapes) and len(shapes) > 40


PASSED = '<testcase classname="kernels.tests.gpu.test_tree_attention" name="a"/>'
TESTS = {
    "green": (PASSED, None),
    "red": (PASSED + PASSED.replace("/>", "><failure/></testcase>"), "1 of 2 did not pass"),
    "skipped": (PASSED.replace("/>", "><skipped/></testcase>"), "1 of 1 did not pass"),
    "absent": (PASSED.replace("tree_attention", "verify"), "none ran"),
}


@pytest.mark.parametrize("outcome", TESTS)
def test_a_kernel_is_timed_only_after_its_tests_passed(outcome, tmp_path):
    cases, message = TESTS[outcome]
    path = tmp_path / "report.xml"
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    if message is None:
        report.require_green(str(path), "tree_attention")
    else:
        with pytest.raises(SystemExit, match=message):
            report.require_green(str(path), "tree_attention")


def test_the_report_holds_figures_and_what_produced_them(tmp_path):
    rows = [{"method": "specdec", "us": 12.3456}, {"method": "flex", "reason": "refused"}]
    path = report.write(rows, report.provenance(), tmp_path, "kernels_none_20260101")
    stored = json.loads(path.read_text())
    assert stored["rows"] == rows and stored["versions"]["torch"] == torch.__version__ and stored["gpu"] == "no GPU"
    table = path.with_suffix(".md").read_text()
    assert re.search(r"\| method \| us \| reason \|\n.*\n\| specdec \| 12.3 \|  \|\n\| flex \|  \| refused \|", table)
