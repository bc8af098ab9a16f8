"""Tree attention is split so that its programs fill an H200, whatever the heads, the tree, the batch and the length."""

import itertools
from pathlib import Path

import bench_tree_attention as bench
import estimates
import floors
import pytest
import torch
import verification_estimate
from transformers import LlamaConfig, LlamaForCausalLM

from specdec_kernels import plan
from specdec_kernels.backend import CHIPS
from specdec_kernels.configs import attention_config

H200 = CHIPS["sm_90"]
MODELS = [bench.LLAMA3, bench.LLAMA2, bench.QWEN25, bench.GEMMA2]
LENGTHS = (1024, 8192, 32768, 131072)
SHAPES = list(itertools.product(MODELS, (1, 16, 64, 256), LENGTHS, (1, 8, 64)))


def grid(model, nodes, length, batch):
    _, heads, kv_heads, dim = model
    rows = nodes * heads // kv_heads
    config = attention_config("sm_90", dim, rows, 2)
    return plan.grid(config, H200.processors, batch * kv_heads, rows, length, -(-nodes // 32))


TABLE = {  # Llama 3 8B: (nodes, batch, length) -> (splits, programs, waves, part of the chip at work in per cent)
    (64, 1, 1024): (5, 80, 1, 61), (64, 1, 8192): (8, 128, 1, 89), (64, 1, 32768): (8, 128, 1, 95),
    (64, 1, 131072): (8, 128, 1, 96), (64, 8, 1024): (1, 128, 1, 97), (64, 8, 131072): (1, 128, 1, 97),
    (64, 64, 8192): (1, 1024, 8, 97), (16, 1, 8192): (33, 264, 1, 98), (16, 8, 32768): (4, 256, 1, 96),
    (1, 1, 8192): (43, 344, 1, 87), (1, 8, 8192): (6, 384, 1, 95), (1, 64, 8192): (3, 1536, 4, 97),
    (256, 1, 8192): (2, 128, 1, 97), (256, 8, 8192): (1, 512, 4, 97),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "batch", "length"), TABLE)
def test_the_plan_of_a_shape_is_that_of_the_table(nodes, batch, length):
    made = grid(bench.LLAMA3, nodes, length, batch)
    count = plan.splits(made)
    found = count, made.programs * plan.used(made, count), plan.waves(made, count), round(100 * plan.busy(made, count))
    assert found == TABLE[nodes, batch, length]


def test_the_chip_is_busy_wherever_that_saves_time():
    idle = {}
    for shape in SHAPES:
        made = grid(*shape)
        if plan.busy(made, plan.splits(made)) < 0.85:
            counts = range(1, min(made.tiles, plan.MOST) + 1)
            idle[shape] = [plan.cost(made, count) for count in counts if plan.busy(made, count) >= 0.85]
            least = plan.cost(made, plan.splits(made))
            # no number of splits keeps it busy, or more beginnings and a merge take the time that this saves
            assert all(plan.SLACK * cost >= least for cost in idle[shape]), shape
    assert len(idle) <= 25 and len(SHAPES) == 192
    # but for a share of 36 tiles that 56 programs of 132 multiprocessors need, these are short texts with few tiles
    beyond = {(model[0], nodes, length, batch) for model, nodes, length, batch in idle if length > 1024}
    assert beyond == {("Qwen2.5-7B", 1, 8192, 1), ("Qwen2.5-7B", 256, 8192, 1)}


@pytest.mark.parametrize("length", [1, 100, 1024, 5000, 8192])
@pytest.mark.parametrize("nodes", [1, 16, 64])
def test_a_bound_that_is_not_reached_costs_little(length, nodes):
    bounded, exact = (
        estimates.tree_attention(floors.Shape(*bench.LLAMA3, nodes, length, 1), H200, capacity)
        for capacity in (131072, None)
    )
    assert bounded.seconds <= exact.seconds + 3e-6  # a merge that has little to do


def slower_than_the_best(model, nodes, length, batch):
    """By the estimate: how many times the best number of splits."""
    name, heads, kv_heads, dim = model
    shape, made = floors.Shape(name, heads, kv_heads, dim, nodes, length, batch), grid(model, nodes, length, batch)
    counts = {plan.splits(made), *(1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)}
    found = {
        count: estimates.tree_attention(shape, H200, splits=count).seconds
        for count in counts
        if count <= min(made.tiles, plan.MOST)
    }
    return found[plan.splits(made)] / min(found.values())


def test_the_plan_is_next_to_the_best_by_the_estimate_too():
    """Both are arithmetic, but the estimate knows bytes, products and launches, where the plan counts tiles."""
    slower = [slower_than_the_best(*shape) for shape in SHAPES]
    short = [slower_than_the_best(*shape) for shape in itertools.product(MODELS, (1, 16, 64), (50, 300), (1, 8))]
    assert max(slower) < 1.2 and sum(x > 1.1 for x in slower) < 0.05 * len(slower)
    assert max(short) < 1.6


def test_few_programs_do_not_wait_for_those_that_are_not_there():
    """One text of 16-row blocks, unsplit: 8 programs fetch as much as 8 multiprocessors do, not as 1 / 50 of the chip."""
    shape = floors.Shape(*bench.LLAMA3, 1, 8192, 1)
    alone, whole = (estimates.tree_attention(shape, H200, splits=count).seconds for count in (1, None))
    keys_and_values = 2 * 2 * 8 * 8256 * 128
    assert alone == pytest.approx(keys_and_values / (8 * estimates.ON_H200.fetched), rel=0.1) and whole < alone / 4


GOALS = {1024: 0.10, 8192: 0.345, 32768: 0.45, 131072: 0.45}  # parts of the floor that 64 nodes of Llama 3 8B reach


@pytest.mark.parametrize("length", GOALS)
def test_by_arithmetic_trees_of_64_nodes_reach_their_part_of_the_floor(length):
    shape = floors.Shape(*bench.LLAMA3, 64, length, 1)
    reached = floors.floor(shape, floors.RATES["NVIDIA H200"]) / estimates.tree_attention(shape, H200).seconds
    assert GOALS[length] <= reached < 0.6


RESIDENT = {  # arch, registers, bytes of shared memory, warps -> programs of a multiprocessor
    ("sm_90", 255, 163856, 8): 1,  # 128 rows: registers for one
    ("sm_90", 252, 114712, 4): 2,  # 64 rows: shared memory for two
    ("sm_90", 161, 71712, 4): 3,  # 16 rows
    ("sm_90", 32, 0, 4): 16,  # 64 warps are all there may be
    ("sm_90", 168, 0, 8): 1,  # three warps in each of four parts
    ("sm_80", 168, 55 << 10, 4): 2,
    ("gfx942", 200, 16384, 4): 2,
    ("gfx942", 64, 32768, 4): 2,
    ("sm_90", 32, 256 << 10, 4): 0,
}


@pytest.mark.parametrize("kernel", RESIDENT)
def test_a_multiprocessor_holds_what_registers_shared_memory_and_warps_allow(kernel):
    assert plan.resident(*kernel) == RESIDENT[kernel]


def test_a_pass_reads_all_weights_but_the_input_embedding():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    matrices = [each for each in model.parameters() if each.ndim == 2 and each is not model.model.embed_tokens.weight]
    assert estimates.Decoder().bytes(floors.Shape(*bench.LLAMA3, 64, 1024, 1)) == sum(
        2 * each.numel() for each in matrices
    )


def test_laws_and_verification_are_estimated_by_what_is_counted(monkeypatch):
    budgets = {name: dict(budget) for name, budget in verification_estimate._BUDGETS.items()}
    monkeypatch.setattr(verification_estimate, "_BUDGETS", budgets)
    found = {kind.name: sum(verification_estimate.parts(kind, H200).values()) for kind in verification_estimate.KINDS}
    goals = {kind.name: 1e-6 * kind.goal for kind in verification_estimate.KINDS if kind.goal}
    # children that are all rejected, and rows of which a tile has more tokens than all but hot laws have, take longer
    beyond = {name for name in found if found[name] > goals[name]}
    assert beyond == {"4 drawn children", "top-p, 512, all room", "top-p, no room"}
    greedy = verification_estimate.KINDS[0]
    budgets[f"sm_90 {greedy.laws}"]["per_token"] *= 2
    # 8 tiles of 8192 tokens by each of 132 multiprocessors, 32 at once
    more = 8 * 8192 / 32 * budgets[f"sm_90 {greedy.laws}"]["per_token"] / 2 / verification_estimate.Assumed().issued
    assert sum(verification_estimate.parts(greedy, H200).values()) - found["greedy"] == pytest.approx(more, rel=1e-6)


def test_the_readme_says_what_is_estimated():
    assert estimates.page() in (Path(__file__).parents[2] / "README.md").read_text("utf-8")
