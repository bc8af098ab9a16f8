"""On a GPU the op computes what the specification says, repeatably, inside CUDA graphs and inside models."""

import pytest
import torch
from attention_cases import Case, assert_right, draw

import specdec
from specdec.drafters import ModelDrafter
from specdec.trees import Widths
from specdec_kernels import tree_attention
from specdec_kernels.tree_attention import MAX_NODES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    Case(nodes, length, 8, kv_heads, head_dim, batch=batch, dtype=dtype, window=window, softcap=softcap, sinks=sinks)
    for dtype in DTYPES
    for nodes, length, batch in ((1, 0, 3), (4, 1, 1), (16, 300, 3), (64, 1024, 2), (256, 77, 1), (33, 8192, 1))
    for kv_heads, head_dim in ((2, 64), (1, 80), (8, 96), (2, 128), (4, 256))
    for window, softcap, sinks in ((None, None, False), (100, 2.0, True))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_op_is_right(case):
    arguments = draw(case, seed=len(str(case)), device="cuda")
    found = tree_attention(**arguments)
    assert_right(arguments, found)
    again = tree_attention(**arguments)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


def test_one_graph_serves_other_trees_and_lengths():
    case = Case(16, 500, 8, 2, 128, batch=2, window=300, dtype=torch.bfloat16)
    static, others = draw(case, 0, "cuda"), [draw(case, seed, "cuda") for seed in (1, 2)]
    tree_attention(**static)  # compile outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = tree_attention(**static)
    for other in others:
        for name, x in other.items():
            if torch.is_tensor(x):
                static[name].copy_(x)
        graph.replay()
        assert_right(other, found)


@pytest.mark.parametrize("name", ["llama", "gemma3_sliding", "gpt_oss_sliding"])
@pytest.mark.parametrize("most", [7, MAX_NODES])  # 7: as many nodes as a tree has; prompts are read in parts
def test_models_write_the_text_that_they_write_on_the_cpu(name, most, monkeypatch):
    from tiny_models import GATE, PROMPTS

    monkeypatch.setattr("specdec.models.attention.MAX_NODES", most)
    models = [GATE[name]().to(device) for device in ("cpu", "cuda")]
    texts = [
        specdec.generate(
            m, [p.to(m.device) for p in PROMPTS], ModelDrafter(m, Widths((2, 2))), max_new_tokens=24
        ).tokens
        for m in models
    ]
    assert [t.tolist() for t in texts[0]] == [t.tolist() for t in texts[1]]
