"""Every kernel compiles within its budget for GPUs that are not here, and the gate finds planted defects."""

import json
import sys
import tarfile

import aot_gate
import precompile
import pytest
from ahead_of_time import compiling
from aot_cases import CASES

from specdec_kernels import configs

GREEDY = next(launch for launch in CASES if launch.name == "law greedy")
PLAIN = next(launch for launch in CASES if launch.name == "tree_attention rows64 head_dim128")
BUDGETS = json.loads(aot_gate.BUDGETS.read_text("utf-8"))["kernels"]


@pytest.mark.parametrize("arch", aot_gate.QUICK)
def test_kernels_are_within_their_budgets(arch):
    measured, faults = aot_gate.gate((arch,), [launch for launch in CASES if launch.quick], BUDGETS)
    assert measured and not faults, "\n".join(faults)


PLANTED = {
    "too many stages": (configs.Config(64, 128, 4, 5, 1), "bytes of shared memory, sm_90 has"),
    "too few warps": (configs.Config(128, 128, 4, 2, 1), "spill instructions, its budget is 0"),
    "no warp groups": (configs.Config(16, 64, 4, 2, 1), "no HGMMA instruction"),
    "fewer programs at once than planned": (
        configs.Config(64, 64, 4, 3, 3),
        "2 programs fit a multiprocessor, the plan",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects_fail(name, monkeypatch):
    config, message = PLANTED[name]
    monkeypatch.setitem(configs.ATTENTION, ("sm_90", 128, 64), config)
    _, faults = aot_gate.gate(("sm_90",), [PLAIN], BUDGETS)
    assert any(message in fault for fault in faults), faults


def test_more_instructions_a_token_fail(monkeypatch):
    from specdec_kernels.triton import tiles

    monkeypatch.setattr(tiles, "_TILE", 1024)  # which does no more for each token, but as much for each tile
    _, faults = aot_gate.gate(("sm_90",), [GREEDY], BUDGETS)
    assert (
        faults[0].startswith("sm_90 law greedy _tile_kernel: ")
        and "instructions a token, its budget is 12" in faults[0]
    )


@pytest.mark.parametrize(
    "field, says", [("products", "tensor cores"), ("registers", "registers a thread"), ("length", "instructions, its")]
)
def test_more_than_a_budget_fails(field, says):
    name = f"sm_90 {PLAIN.name} tree_attention_kernel"
    tight = {**BUDGETS, name: BUDGETS[name] | {field: int(0.9 * BUDGETS[name][field])}}
    _, (fault,) = aot_gate.gate(("sm_90",), [PLAIN], tight)
    assert says in fault and fault.startswith(name)


def test_a_launch_without_a_budget_fails():
    _, faults = aot_gate.gate(("sm_90",), [GREEDY._replace(name="law renamed")], BUDGETS)
    assert [fault.split(": ")[1][:25] for fault in faults] == ["no budget of length, per_"] * 2


def test_no_exponential_is_computed_at_temperature_0():
    with aot_gate.compiling("sm_90") as kernels:
        GREEDY.run()
    assert [kernel.instructions["MUFU"] for kernel in kernels] == [0, 0]


def test_what_no_copy_engine_serves_lacks_its_instruction(monkeypatch):
    from specdec_kernels.triton import tree_attention

    monkeypatch.setattr(tree_attention, "_axes", lambda key, value: None)
    _, faults = aot_gate.gate(("sm_90",), [PLAIN], BUDGETS)
    assert faults == [
        f"sm_90 {PLAIN.name} tree_attention_kernel: no UTMALDG instruction: it does not use the unit it is meant for"
    ]


def test_what_begins_early_waits_before_it_reads():
    with compiling("sm_90") as kernels:
        PLAIN.run()
    attention, merge = (list(kernel.instructions) for kernel in kernels)  # in the order in which they come first
    assert "PREEXIT" in attention and merge.index("ACQBULK") < merge.index("LDG")


def test_kernels_compiled_beforehand_are_a_cache_of_tritons(tmp_path, monkeypatch):
    some = {launch.func: launch for launch in precompile.launches()}
    assert len(some) == 6  # ops, those of recurrences counted as one, and those of stored matrices
    monkeypatch.setenv("TRITON_CACHE_DIR", "set by main")
    monkeypatch.setattr(precompile, "launches", lambda: [some[precompile._attention], some[precompile._compact]])
    monkeypatch.setattr(sys, "argv", ["precompile.py", str(tmp_path / "made.tar.gz")])
    precompile.main()
    with tarfile.open(tmp_path / "made.tar.gz") as archive:
        names = archive.getnames()
    for kernel in ("tree_attention_kernel", "_compact_kernel"):
        assert any(name.endswith(f"/{kernel}.cubin") for name in names)
