"""Compaction, top k and tree building, kernel against specification."""

import pytest
import torch
from random_trees import random_trees

from specdec_kernels.reference.compact import compact as compact_reference
from specdec_kernels.reference.topk import topk as topk_reference
from specdec_kernels.reference.tree_attention import pack
from specdec_kernels.reference.tree_build import tree_build as tree_build_reference
from specdec_kernels.triton.compact import compact
from specdec_kernels.triton.topk import topk
from specdec_kernels.triton.tree_build import tree_build

LOG = 1e-5  # a log-probability of about -10 in float32


@pytest.mark.parametrize("shape", [(3, 5), (2, 40)], ids=str)  # heads and dimension, in one piece and in several
def test_compaction_moves_what_is_kept_and_touches_no_committed_slot(shape):
    lengths, count = torch.tensor([3, 0, 5]), torch.tensor([3, 1, 4])
    path = torch.tensor([[0, 2, 3, 9], [0, 0, 0, 0], [0, 1, 4, 5]])
    stack = torch.randn(2, 3, 14, *shape).to(torch.bfloat16)
    got, due = stack.clone(), stack.clone()
    compact(got, path, lengths, count)
    compact_reference(due, path, lengths, count)
    for row, end in enumerate((lengths + count).tolist()):
        assert torch.equal(got[:, row, :end], due[:, row, :end])
        moved = path[row, : count[row]] + lengths[row]
        assert torch.equal(due[:, row, lengths[row] : end], stack[:, row, moved])
        assert torch.equal(due[:, row, : lengths[row]], stack[:, row, : lengths[row]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top_k_among_equals_takes_the_smaller_token(dtype):
    logits = (torch.randn(2, 4200, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    logits[1] = logits[1].round()
    logits[1, :50] = -torch.inf
    (logp, token), (due, first) = topk(logits, 5, 0.7), topk_reference(logits, 5, 0.7)
    assert torch.equal(token, first)
    torch.testing.assert_close(logp, due, atol=LOG, rtol=0)


def test_ancestor_words_and_depths_are_those_of_the_topology():
    parents = torch.tensor([[-1, *[i // 2 for i in range(69)]], [-1, *range(69)]])
    words, depths = tree_build(parents, 69)
    due = tree_build_reference(parents, 69)
    assert torch.equal(words, due[0])
    assert torch.equal(depths, due[1])
    topology = random_trees(3, 5, 4)[0].topology
    words, depths = tree_build_reference(topology.parents, topology.depth)
    assert torch.equal(words, pack(topology.ancestors))
    assert torch.equal(depths, topology.depths)
