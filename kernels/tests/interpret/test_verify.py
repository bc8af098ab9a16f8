"""Sibling rejection: kernel against specification on the same coins, and what a wrong kernel would look like."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_trees import random_trees

import specdec_kernels.triton.verify as kernel
from specdec import Law
from specdec_kernels.reference import verify as reference

FLOAT32 = 1e-5  # how far a float32 threshold may be from the float64 one: a few roundings of a sum over the vocabulary
PLAIN = (1.0, None, None, None)  # temperature, top-k, top-p, min-p


def arguments(tree, logits, accept, emit, filters=PLAIN, lenience=1.0) -> tuple[Any, ...]:
    drafted = tree.tokens, tree.topology.children, tree.laws, tree.draft_probs
    return logits, *drafted, accept, emit, tree.topology.depth, *filters, lenience


def coins(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 16] each: more columns than trees have nodes, as in a run."""
    generator = torch.Generator().manual_seed(seed)
    accept, emit = torch.rand(2, rows, 16, dtype=torch.float64, generator=generator)
    return accept, emit


def differing(one, other) -> torch.Tensor:
    """[batch] bool: rows decided differently."""
    kept = torch.arange(one[0].shape[1]) <= other[1][:, None]
    return (one[1] != other[1]) | (one[2] != other[2]) | ((one[0] != other[0]) & kept).any(1) | (one[3] != other[3])


def battery():
    """Arguments that together tell every planted bug from the kernel."""
    for seed, (rows, vocab) in enumerate([(3, 6), (4, 12), (3, 30), (3, 5)]):
        tree, logits = random_trees(rows, vocab, seed, width=1 if seed == 3 else 3)
        yield arguments(tree, logits, *coins(rows, seed), lenience=0.5 if seed == 2 else 1.0)
    tree, logits = random_trees(4, 12, 5, laws=[Law.SAMPLED_THEN_TOP])
    yield arguments(tree, logits, *coins(4, 5))
    tree, logits = random_trees(4, 12, 6, laws=[Law.IID])
    logits = torch.where(torch.arange(12) < 6, logits, -torch.inf)  # children at 6 and above are impossible
    lowest, highest = torch.zeros(4, 16, dtype=torch.float64), torch.ones(4, 16, dtype=torch.float64)
    yield arguments(tree, logits, lowest, highest)  # 1 stands for a coin that rounding carries beyond the last sum


def test_float64_decisions_are_those_of_the_specification():
    for case in battery():
        assert not differing(kernel.verify(*case), reference.verify(*case)).any()


@pytest.mark.parametrize(
    ("dtype", "filters"),
    [(torch.float32, PLAIN), (torch.float32, (0.0, None, None, None)), (torch.bfloat16, (0.5, 4, 0.9, 0.05))],
    ids=str,
)
def test_lower_precision_decides_otherwise_only_next_to_a_threshold(dtype, filters):
    tree, logits = random_trees(4, 12, 7)
    logits = logits.to(dtype)
    assert tree.draft_probs is not None
    low = replace(tree, draft_probs=tree.draft_probs.float())
    accept, emit = coins(4, 7)
    got = kernel.verify(*arguments(low, logits, accept, emit, filters))
    due = []
    for shift in (0, -FLOAT32, FLOAT32):
        shifted = (torch.stack([accept, emit]) + shift).clamp(0, 1 - 1e-16)
        due.append(reference.verify(*arguments(tree, logits, shifted[0], shifted[1], filters)))
    odd, unsure = differing(got, due[0]), differing(due[0], due[1]) | differing(due[0], due[2])
    assert not (odd & ~unsure).any()


def test_trees_of_points_and_the_root_alone_need_no_draft():
    tree, logits = random_trees(3, 9, 1, laws=[Law.POINT])
    case = arguments(replace(tree, draft_probs=None), logits, *coins(3, 1))
    assert not differing(kernel.verify(*case), reference.verify(*case)).any()
    alone = logits[:, :1], tree.tokens[:, :1], tree.tokens.new_empty(3, 1, 0), tree.laws[:, :1], None, *coins(3, 2)
    root: Any = (*alone, 0, *PLAIN, 1.0)
    assert not differing(kernel.verify(*root), reference.verify(*root)).any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_only_visited_nodes_are_reported():
    tree, logits = random_trees(6, 8, 2)
    case = arguments(tree, logits, *coins(6, 2))
    path, accepted, *_ = reference.verify(*case)
    visited = torch.zeros(logits.shape[:2], dtype=torch.bool)
    visited.scatter_(1, torch.where(torch.arange(path.shape[1]) <= accepted[:, None], path, 0), True)
    unseen = logits.masked_fill(~visited[..., None], torch.nan)
    assert not differing(kernel.verify(unseen, *case[1:]), reference.verify(*case)).any()
    logits[2, 0, 3] = torch.nan
    assert kernel.verify(logits, *case[1:])[3].tolist() == [row == 2 for row in range(6)]


BUGS = {
    "a coin equal to its threshold accepts": (
        "tl.load(p_accept + index) < ratio",
        "tl.load(p_accept + index) <= ratio",
    ),
    "c is not updated": ("next_owed, scale + growth", "next_owed, scale"),
    "top children drawn like independent ones": ("kind == _TOP", "kind == _PADDING"),
    "the last token at overshoot": ("tl.max(tl.where(b_mass > 0, o, -1))", "END - 1"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, tmp_path):
    old, new = BUGS[bug]
    source = Path(kernel.__file__).read_text()
    assert source.count(old) == 1
    path = tmp_path / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None and spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    assert any(differing(planted.verify(*case), reference.verify(*case)).any() for case in battery())
