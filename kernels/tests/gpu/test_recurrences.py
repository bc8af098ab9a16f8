"""On a GPU the ops of recurrences compute what the specification says, repeatably, inside CUDA graphs too."""

from typing import Any

import pytest
import torch
from recurrence_cases import Case, assert_folds, assert_right, draw
from verification_cases import fresh_seed

import specdec_kernels
from specdec_kernels.reference.gated_delta import gated_delta as specified

OPS = {"linear_attention": specdec_kernels.linear_attention, "gated_delta": specdec_kernels.gated_delta}
CASES = [
    Case(nodes, earlier, kept, key_heads, 4, *dims, batch=5, dtype=dtype, alike=alike)
    for dtype in (torch.float32, torch.bfloat16)
    for nodes, earlier, kept, key_heads, dims, alike in (
        (1, 0, 1, 1, (128, 128), False),
        (16, 0, 6, 2, (128, 128), False),
        (5, 7, None, 2, (128, 64), False),
        (64, 0, 64, 4, (128, 128), False),
        (64, 0, 6, 2, (64, 256), True),
        (40, 24, 17, 1, (256, 128), False),
        (9, 0, 3, 2, (24, 40), False),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_op_is_right(op, case):
    arguments, again = (draw(op, case, seed, "cuda") for seed in [fresh_seed()] * 2)
    assert_right(op, arguments, OPS[op])
    OPS[op](**again)
    for name in {"state", "update"} & arguments.keys():
        assert torch.equal(arguments[name], again[name])


@pytest.mark.parametrize("case", [case for case in CASES if case.kept], ids=str)
def test_accepted_nodes_enter_the_state(case):
    assert_folds(case, fresh_seed(), specdec_kernels.fold_linear_attention, "cuda")


@pytest.mark.parametrize("change", ["decays by channel", "float64", "65 nodes"])
def test_what_there_is_no_kernel_for_is_computed_by_the_specification(change):
    arguments = draw("gated_delta", Case(65 if change == "65 nodes" else 9, kept=None), fresh_seed(), "cuda")
    if change == "decays by channel":
        arguments["decay"] = arguments["decay"][..., None].expand(-1, -1, -1, 24)
    due: dict[str, Any] = {
        n: x.double() if x is not None and x.is_floating_point() else x for n, x in arguments.items()
    }
    found = specdec_kernels.gated_delta(**(due if change == "float64" else arguments))
    assert found.dtype == (torch.float64 if change == "float64" else torch.float32)
    torch.testing.assert_close(found.double(), specified(**due), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_one_graph_serves_other_trees_and_states(op):
    case = Case(16, 0, 6, 2, 4, 128, 128)
    static, *others = (draw(op, case, fresh_seed() + i, "cuda") for i in range(3))
    OPS[op](**draw(op, case, 0, "cuda"))  # compile outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OPS[op](**static)

    def replayed(**arguments):
        for name, x in arguments.items():
            for to, new in zip(static[name], x, strict=True) if name == "fold" else [(static[name], x)]:
                to.copy_(new)
        graph.replay()
        for name in {"state", "update"} & arguments.keys():
            arguments[name].copy_(static[name])
        return out

    for other in others:
        assert_right(op, other, replayed)
