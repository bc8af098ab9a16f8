"""On a GPU what is kept moves as the specification moves it, inside CUDA graphs too."""

import pytest
import torch
import verification
from floors import Compaction
from verification_cases import assert_compacts, fresh_seed

from specdec_kernels import compact


@pytest.mark.parametrize("shape", [(3, 5), (2, 40), (1, 80), (8, 128), (4, 256)], ids=str)  # heads and dimension
def test_the_op_is_right(shape):
    assert_compacts(compact, shape, "cuda", fresh_seed())


@pytest.mark.parametrize("kept", [2, 8, 60])
def test_whole_caches_are_compacted_as_in_torch(kept):
    for batch in (1, 8):
        shape = Compaction("compact", batch, layers=4, kept=kept)
        assert verification.fault(shape, compact, verification.compact_inputs(shape, "cuda", fresh_seed())) is None


def test_one_graph_serves_other_paths():
    shape, seed = Compaction("compact", 2, layers=2), fresh_seed()
    ((stack, *static),) = verification.compact_inputs(shape, "cuda", seed)
    found = stack.clone()
    compact(found.clone(), *static)  # compile outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compact(found, *static)
    for other in (seed + 1, seed + 2):
        ((_, *arguments),) = verification.compact_inputs(shape, "cuda", other)
        for to, x in zip(static, arguments, strict=True):
            to.copy_(x)
        found.copy_(stack)
        graph.replay()
        due = stack.clone()
        compact(due, *arguments)
        assert torch.equal(found, due)
