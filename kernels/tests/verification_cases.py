"""Random inputs of laws, verification and compaction, and what is right of their results, for every device."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import torch
from random_trees import random_trees
from torch import Tensor

from specdec import DraftTree, Law, Topology
from specdec_kernels.reference import verify as reference
from specdec_kernels.reference.compact import compact as compact_reference
from specdec_kernels.reference.law import law as law_reference

FLOAT32 = 1e-5  # how far a float32 threshold may be from the float64 one: a few roundings of a sum over the vocabulary
TOTAL = 3e-6  # relative, of a sum of exponentials: a float32 argument of 20 rounds by 1e-6, the chip's exp2 by 2e-7
PLAIN = (1.0, None, None, None)  # temperature, top-k, top-p, min-p
GREEDY = (0.0, None, None, None)
FILTERS = [
    GREEDY,
    (1.0, None, None, 0.1),
    (0.5, 5, None, None),
    (0.75, None, 0.9, None),
    (0.75, 20, 0.8, 0.05),
]


def fresh_seed() -> int:
    """Printed when a test fails; SEED=... runs it again."""
    seed = int(os.environ.get("SEED", secrets.randbits(32)))
    print(f"SEED={seed}")
    return seed


def law_logits(vocab: int, dtype: torch.dtype, seed: int = 0, rows: int = 3) -> Tensor:
    """Rows with ties everywhere, ties at the top, and tokens that cannot occur."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    x[0] = x[0].round()
    x[1, vocab // 2] = x[1].max()
    x[2, : vocab // 3] = -torch.inf
    return x.to(dtype)


def assert_law_is_right(logits: Tensor, filters: tuple, found: tuple[Tensor, Tensor]) -> None:
    """The laws found of `logits` [row, vocab] are those of the specification in float64, up to rounding at a threshold."""
    exact, (law, best) = logits.double(), found
    due, first = law_reference(exact, *filters)
    assert torch.equal(best, first) and torch.equal(law[:, 0], due[:, 0])
    kept, right = ((exact >= numbers[:, 1:2]) & exact.isfinite() for numbers in (law, due))
    if filters[0] == 0:
        assert torch.equal(law, due)
        return
    weights = ((exact - due[:, :1]) / filters[0]).exp()
    disputed = (weights * (kept != right)).sum(1) / due[:, 2]
    assert disputed.max() <= FLOAT32, f"tokens of weight {disputed.max():.1e} are kept or left out wrongly"
    torch.testing.assert_close(law[:, 2], (weights * kept).sum(1), rtol=TOTAL, atol=0)


def verify_arguments(tree, logits, accept, emit, filters=PLAIN, lenience=1.0) -> tuple[Any, ...]:
    drafted = tree.tokens, tree.topology.children, tree.laws, tree.draft_probs
    return logits, *drafted, accept, emit, tree.topology.depth, *filters, lenience


def coins(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """[rows, 16] each: more columns than trees have nodes, as in a run."""
    generator = torch.Generator().manual_seed(seed)
    accept, emit = torch.rand(2, rows, 16, dtype=torch.float64, generator=generator)
    return accept, emit


def differing(one, other) -> Tensor:
    """[batch] bool: rows decided differently."""
    one, other = ([x.cpu() for x in results] for results in (one, other))
    kept = torch.arange(one[0].shape[1]) <= other[1][:, None]
    return (one[1] != other[1]) | (one[2] != other[2]) | ((one[0] != other[0]) & kept).any(1) | (one[3] != other[3])


def wrong(found, case: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """[batch] bool each: rows that were not decided as in float64 though no coin is next to a threshold; those where one is."""
    due = [reference.verify(*_exact(case, shift)) for shift in (0.0, -FLOAT32, FLOAT32)]
    unsure = differing(due[0], due[1]) | differing(due[0], due[2])
    return differing(found, due[0]) & ~unsure, unsure


def _exact(case: tuple[Any, ...], shift: float) -> list[Any]:
    """The same in float64, the coins shifted."""
    moved = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in case]
    moved[5:7] = [(coin + shift).clamp(0, 1 - 1e-16) for coin in moved[5:7]]
    return moved


def battery(first_seed: int = 0) -> Iterator[tuple[Any, ...]]:
    """Arguments that together tell every planted bug from the kernel."""
    # the first child is certain, but its coin is beyond rounding; the second is certain once the first is rejected
    yield _rejected(Law.WITHOUT_REPLACEMENT, [1, 1, 1, 1, 1, 1, 1, 1], 1.0, first_seed + 7)
    yield _rejected(Law.POINT, [0, 1, 1, 0, 0, 0, 0, 0], 0.9, first_seed + 8)
    tree, logits = random_trees(4, 12, first_seed + 5, laws=[Law.SAMPLED_THEN_TOP])
    yield verify_arguments(tree, logits, *coins(4, first_seed + 5))
    tree, logits = random_trees(4, 12, first_seed + 6, laws=[Law.IID])
    logits = torch.where(torch.arange(12) < 6, logits, -torch.inf)  # children at 6 and above are impossible
    lowest, highest = torch.zeros(4, 16, dtype=torch.float64), torch.ones(4, 16, dtype=torch.float64)
    yield verify_arguments(
        tree, logits, lowest, highest
    )  # 1 stands for a coin that rounding carries beyond the last sum
    for seed, (rows, vocab) in enumerate([(3, 6), (4, 12), (3, 30), (3, 5)]):
        tree, logits = random_trees(rows, vocab, first_seed + seed, width=1 if seed == 3 else 3)
        yield verify_arguments(tree, logits, *coins(rows, first_seed + seed), lenience=0.5 if seed == 2 else 1.0)


def _rejected(law: Law, weights: list[float], coin: float, seed: int) -> tuple[Any, ...]:
    """A root with tokens 1, 2 and 3 after it, drawn from the target's law; every coin of theirs is the same."""
    rows, tokens = 4, torch.arange(4).expand(4, -1)
    p = torch.tensor(weights, dtype=torch.float64).expand(rows, 1, -1)
    tree = DraftTree(tokens, Topology((tokens > 0).long() - 1, 1, 3), torch.full_like(tokens, law).to(torch.uint8), p)
    accept, emit = coins(rows, seed)
    return verify_arguments(tree, p.log().expand(-1, 4, -1), accept.fill_(coin), emit)


def with_nan_where_nobody_looks(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, the logits of nodes that the specification does not visit full of NaN."""
    logits = case[0]
    path, accepted, *_ = reference.verify(*case)
    visited = torch.zeros(logits.shape[:2], dtype=torch.bool)
    visited.scatter_(1, torch.where(torch.arange(path.shape[1]) <= accepted[:, None], path, 0), True)
    return logits.masked_fill(~visited[..., None], torch.nan), *case[1:]


def assert_compacts(compact: Callable[..., None], shape: tuple[int, int], device: str = "cpu", seed: int = 0) -> None:
    """Slots of `shape` [head, dim] that are kept move as the specification moves them, and no committed slot is touched."""
    generator = torch.Generator().manual_seed(seed)
    lengths, count = torch.tensor([3, 0, 5]), torch.tensor([3, 1, 4])
    path = torch.tensor([[0, 2, 3, 9], [0, 0, 0, 0], [0, 1, 4, 5]])
    stack = torch.randn(2, 3, 14, *shape, generator=generator).to(torch.bfloat16)
    found, due = stack.to(device, copy=True), stack.clone()
    compact(found, *(x.to(device) for x in (path, lengths, count)))
    compact_reference(due, path, lengths, count)
    for row, end in enumerate((lengths + count).tolist()):
        assert torch.equal(found[:, row, :end].cpu(), due[:, row, :end])
        moved = path[row, : count[row]] + lengths[row]
        assert torch.equal(due[:, row, lengths[row] : end], stack[:, row, moved])
        assert torch.equal(due[:, row, : lengths[row]], stack[:, row, : lengths[row]])
