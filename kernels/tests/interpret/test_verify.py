"""Sibling rejection: kernel against specification on the same coins, and what a wrong kernel would look like."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from planted import planted
from program_order import backwards
from random_trees import random_trees
from verification_cases import (
    GREEDY,
    PLAIN,
    battery,
    coins,
    differing,
    verify_arguments,
    with_nan_where_nobody_looks,
    wrong,
)

import specdec_kernels.triton.verify as kernel
from specdec import DraftTree, Law, Topology
from specdec_kernels.reference import verify as reference
from specdec_kernels.triton import tiles as tiling

pytestmark = pytest.mark.usefixtures("poisoned")


def test_float64_decisions_are_those_of_the_specification():
    for case in battery():
        assert not differing(kernel.verify(*case), reference.verify(*case)).any()


def test_many_blocks_decide_as_one_does(monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", 32)  # of float64 16
    monkeypatch.setattr(tiling, "_TILE", 64)  # of float64 16
    case = next(case for case in battery() if case[0].shape[2] == 30)
    assert not differing(kernel.verify(*case), reference.verify(*case)).any()
    with backwards():  # whichever program ends a row
        assert not differing(kernel.verify(*case), reference.verify(*case)).any()


@pytest.mark.parametrize(
    ("dtype", "filters"),
    [(torch.float32, PLAIN), (torch.float32, GREEDY), (torch.bfloat16, GREEDY), (torch.bfloat16, (0.5, 4, 0.9, 0.05))],
    ids=str,
)
def test_lower_precision_decides_otherwise_only_next_to_a_threshold(dtype, filters):
    tree, logits = random_trees(4, 12, 7)
    logits = logits.to(dtype)
    assert tree.draft_probs is not None
    low = replace(tree, draft_probs=tree.draft_probs.float())
    case = verify_arguments(low, logits, *coins(4, 7), filters)
    assert not wrong(kernel.verify(*case), case)[0].any()


def test_trees_of_points_and_the_root_alone_need_no_draft():
    tree, logits = random_trees(3, 9, 1, laws=[Law.POINT])
    case = verify_arguments(replace(tree, draft_probs=None), logits, *coins(3, 1))
    assert not differing(kernel.verify(*case), reference.verify(*case)).any()
    alone = logits[:, :1], tree.tokens[:, :1], tree.tokens.new_empty(3, 1, 0), tree.laws[:, :1], None, *coins(3, 2)
    root: Any = (*alone, 0, *PLAIN, 1.0)
    assert not differing(kernel.verify(*root), reference.verify(*root)).any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_only_visited_nodes_are_reported():
    tree, logits = random_trees(6, 8, 2)
    case = verify_arguments(tree, logits, *coins(6, 2))
    assert not differing(kernel.verify(*with_nan_where_nobody_looks(case)), reference.verify(*case)).any()
    logits[2, 0, 3] = torch.nan
    assert kernel.verify(logits, *case[1:])[3].tolist() == [row == 2 for row in range(6)]


def test_a_tree_that_is_deeper_than_it_says_stays_in_its_row():
    """Every child is accepted, and the path has room for one: nothing else may be written to."""
    parents = torch.tensor([[-1, 0, 1, 2]]).expand(2, -1)
    tree = DraftTree(torch.ones_like(parents), Topology(parents, 1, 1), torch.zeros_like(parents, dtype=torch.uint8))
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf]).expand(2, 4, -1)
    path, accepted, token, _ = kernel.verify(*verify_arguments(tree, logits, *coins(2, 0)))
    assert path.tolist() == [[0, 1], [0, 1]]
    assert accepted.tolist() == [1, 1]
    assert token.tolist() == [1, 1]


BUGS = {
    "a coin equal to its threshold accepts": (
        "b_coin < b_limit",
        "b_coin <= b_limit",
    ),
    "c is not updated": ("tl.store(p_scale + j, scale)", "tl.store(p_scale + j, 0.0)"),
    "points stay owed": ("b_rank[None, :], -1) >= j", "b_rank[None, :], -1) > j + 99"),
    "siblings are lost where what was owed stays owed": ("tl.where(after < drawn, b_owed, 0.0)", "b_owed * 0"),
    "top children drawn like independent ones": ("kind == _TOP", "kind == _PADDING"),
    "the last token at overshoot": ("tl.max(tl.where(b_mass > 0, o, -1))", "END - 1"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, tmp_path):
    wrong_kernel = planted(kernel, *BUGS[bug], tmp_path)
    assert any(differing(wrong_kernel.verify(*case), reference.verify(*case)).any() for case in battery())
