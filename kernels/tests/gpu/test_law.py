"""On a GPU laws are those of the specification, repeatably and inside CUDA graphs."""

import pytest
import torch
from verification_cases import FILTERS, assert_law_is_right, fresh_seed, law_logits

from specdec_kernels import law

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(5, 3), (70, 4), (4097, 3), (50257, 3), (128256, 64)]  # vocab, rows


@pytest.mark.parametrize("filters", [*FILTERS, (0.7, None, 0.9, None), (1.0, 1, None, None)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_is_right(dtype, filters):
    for vocab, rows in SIZES:
        logits = law_logits(vocab, dtype, fresh_seed(), rows).cuda()
        found = law(logits, *filters)
        assert_law_is_right(logits, filters, found)
        assert all(map(torch.equal, law(logits, *filters), found))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_logits_that_are_no_law_have_no_total(filters):
    x = torch.zeros(4, 128256, device="cuda")
    x[0, 3], x[1], x[2, 2] = torch.nan, -torch.inf, torch.inf
    assert law(x, *filters)[0][:, 2].isnan().tolist() == [True, True, True, False]


def test_one_graph_serves_other_logits():
    filters, seed = (0.7, 50, 0.9, None), fresh_seed()
    static = law_logits(128256, torch.bfloat16, seed).cuda()
    law(static, *filters)  # compile outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = law(static, *filters)
    for other in (seed + 1, seed + 2):
        static.copy_(law_logits(128256, torch.bfloat16, other))
        graph.replay()
        assert_law_is_right(static, filters, found)
