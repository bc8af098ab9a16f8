"""On a GPU sibling rejection decides as the specification does, repeatably and inside CUDA graphs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import verification
from floors import Laws
from random_trees import random_trees
from verification_cases import (
    PLAIN,
    battery,
    coins,
    differing,
    fresh_seed,
    verify_arguments,
    with_nan_where_nobody_looks,
    wrong,
)

from specdec import Law
from specdec_kernels import verify
from specdec_kernels.reference import verify as reference

LLAMA3, GPT2 = {"nodes": 64, "vocab": 128256, "width": 4}, {"nodes": 33, "vocab": 50257, "width": 5}
CHAIN, WIDE = {"nodes": 6, "vocab": 151936, "width": 1}, {"nodes": 18, "vocab": 32000, "width": 16}
LARGE = [
    (LLAMA3, torch.bfloat16),
    (LLAMA3, torch.float32),
    (GPT2, torch.bfloat16),
    (CHAIN, torch.float32),
    (WIDE, torch.bfloat16),
]


def on_cuda(case: tuple) -> tuple[Any, ...]:
    return tuple(x.cuda() if torch.is_tensor(x) else x for x in case)


@pytest.mark.parametrize("turn", range(20))
def test_float64_decisions_are_those_of_the_specification(turn):
    for case in battery(fresh_seed() % 10**6):
        assert not differing(verify(*on_cuda(case)), reference.verify(*case)).any()


@pytest.mark.parametrize(("sizes", "dtype"), LARGE, ids=str)
@pytest.mark.parametrize("children", [law.name for law in Law if law != Law.PADDING])
def test_large_vocabularies_are_decided_otherwise_only_next_to_a_threshold(sizes, dtype, children):
    for sampling in verification.SAMPLINGS:
        logits, *rest = verification.verify_inputs(Laws("verify", sampling, children, 3, **sizes), "cuda", fresh_seed())
        case = (logits.to(dtype), *rest)
        found = verify(*case)
        assert not wrong(found, case)[0].any()
        assert all(map(torch.equal, verify(*case), found))


def test_few_large_decisions_are_next_to_a_threshold():
    shape = Laws("verify", "temperature", "WITHOUT_REPLACEMENT", 16, **LLAMA3)
    case = verification.verify_inputs(shape, "cuda", fresh_seed())
    bad, unsure = wrong(verify(*case), case)
    assert not bad.any() and unsure.float().mean() < 0.5  # else the tests above could hardly fail


def test_trees_of_points_and_the_root_alone_need_no_draft():
    tree, logits = random_trees(3, 9, fresh_seed() % 10**6, laws=[Law.POINT])
    case = verify_arguments(replace(tree, draft_probs=None), logits, *coins(3, 1))
    assert not differing(verify(*on_cuda(case)), reference.verify(*case)).any()
    alone = logits[:, :1], tree.tokens[:, :1], tree.tokens.new_empty(3, 1, 0), tree.laws[:, :1], None, *coins(3, 2)
    root = (*alone, 0, *PLAIN, 1.0)
    assert not differing(verify(*on_cuda(root)), reference.verify(*root)).any()


def test_only_visited_nodes_are_reported():
    tree, logits = random_trees(6, 8, 2)
    case = verify_arguments(tree, logits, *coins(6, 2))
    unseen = with_nan_where_nobody_looks(case)
    assert not differing(verify(*on_cuda(unseen)), reference.verify(*case)).any()
    logits[2, 0, 3] = torch.nan
    assert verify(*on_cuda((logits, *case[1:])))[3].tolist() == [row == 2 for row in range(6)]


@pytest.mark.parametrize("children", ["POINT", "SAMPLED_THEN_TOP"])
def test_one_graph_serves_other_trees(children):
    shape, seed = Laws("verify", "temperature", children, 2, **GPT2), fresh_seed()
    static, *others = (verification.verify_inputs(shape, "cuda", seed + i) for i in range(3))
    verify(*static)  # compile outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = verify(*static)
    for other in others:
        for to, x in zip(static, other, strict=True):
            if torch.is_tensor(to):
                to.copy_(x)
        graph.replay()
        assert not differing(found, verify(*other)).any()
