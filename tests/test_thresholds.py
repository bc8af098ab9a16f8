"""Every coin of deeper trees: batched code accepts a node up to the coin that the specification does, to the last digits."""

from dataclasses import replace

import pytest
import torch
from random_trees import SAMPLED, random_trees

from experiments.certify_fast import RULES
from specdec import Law
from specdec.batch import Batch
from specdec.rules import BlockVerification, KSeq, Rule, TraversalVerification, block, traversal
from specdec.sampling import Sampling
from specdec.target_law import LogitsLaw
from specdec.testing.fast_paths import LEAST_COIN, SURE, GivenCoins, bisect
from specdec.tree import DraftTree, Topology

VOCAB, ROWS = 7, 12
# how far thresholds may be apart: of float64, roundings of sums; of float32, those where a few percent are owed
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


def trees_for(rule: Rule, seed: int) -> tuple[DraftTree, torch.Tensor]:
    """Ragged trees that the rule admits, of mixed laws and up to five children; the target's logits."""
    width = 1 if isinstance(rule, BlockVerification) else 5
    laws = [Law.IID] if isinstance(rule, KSeq) else [Law.POINT, *SAMPLED]
    return random_trees(ROWS, VOCAB, seed, width, laws)


class EveryNode:
    """Each node of each row in a row of its own, with coins for which it alone is in doubt.

    Nodes above it are accepted if they are asked, all others are not: so the node is accepted up to a coin of its own.
    """

    def __init__(self, tree: DraftTree, logits: torch.Tensor):
        exists = tree.laws != Law.PADDING
        exists[:, 0] = False
        self.row, self.node = exists.nonzero(as_tuple=True)
        shape = tree.topology
        self.tree = DraftTree(
            tree.tokens[self.row], Topology(shape.parents[self.row], shape.depth, shape.width), tree.laws[self.row],
            None if tree.draft_probs is None else tree.draft_probs[self.row],
        )  # fmt: skip
        self.logits = logits[self.row]
        above = self.tree.topology.ancestors[torch.arange(len(self.row)), self.node]
        self.coins = torch.where(above, torch.tensor(LEAST_COIN, dtype=torch.float64), SURE)

    def accepted(self, decide, rows: torch.Tensor, coin: torch.Tensor) -> torch.Tensor:
        """[row] bool: whether the node in doubt is accepted with a `coin` [row] of its own."""
        accept = self.coins[rows].scatter(1, self.node[rows, None], coin.clamp(LEAST_COIN, SURE)[:, None])
        whole = self.tree
        tree = DraftTree(
            whole.tokens[rows],
            Topology(whole.topology.parents[rows], whole.topology.depth, whole.topology.width),
            whole.laws[rows],
            whole.draft_probs[rows],
        )
        batch = Batch(len(rows), 1, VOCAB, torch.device("cpu"))
        batch.sampling = Sampling(1.0)
        law = LogitsLaw(self.logits[rows], tree, batch)
        made = decide(tree, law, GivenCoins(accept, torch.zeros_like(accept)))
        kept = torch.arange(made.path.shape[1]) <= made.accepted[:, None]
        return ((made.path == self.node[rows, None]) & kept).any(1)


def wrong_thresholds(rule: Rule, dtype: torch.dtype, seeds: range) -> tuple[int, int]:
    """Nodes whose threshold is not the specification's, and nodes in all."""
    wrong = total = 0
    for seed in seeds:
        tree, logits = trees_for(rule, seed)
        low = replace(tree, draft_probs=tree.draft_probs.to(dtype))
        fast = EveryNode(low, logits.to(dtype))
        exact = EveryNode(replace(low, draft_probs=low.draft_probs.double()), logits.to(dtype).double())
        every, near = torch.arange(len(fast.row)), TOLERANCE[dtype]

        def by_specification(coin, exact=exact, every=every):
            return exact.accepted(lambda *args: Rule.decide_batch(rule, *args), every, coin)

        def by_batched_code(rows, coin, fast=fast):
            return fast.accepted(rule.decide_batch, rows, coin)

        found = bisect(by_batched_code, torch.full((len(every),), 1e-7 / near / len(every), dtype=torch.float64))
        above, below = by_specification(found + 2 * near), by_specification(found - 2 * near)
        wrong += int(((above & (found < 1 - 3 * near)) | (~below & (found > 3 * near))).sum())
        total += len(every)
    return wrong, total


def name_of(value) -> str:
    return type(value).__name__


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_every_node_is_accepted_up_to_the_coin_of_the_specification(rule):
    wrong, total = wrong_thresholds(rule, torch.float64, range(6))
    assert total > 100
    assert wrong == 0


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_in_float32_thresholds_are_those_of_float64_but_where_next_to_nothing_is_owed(rule):
    wrong, total = wrong_thresholds(rule, torch.float32, range(6))
    assert wrong <= total // 50


_residual = block.residual_batch


def a_little_less(reach, p, rest):
    """A node above a rejected one is accepted a ten-thousandth less often than it should be."""
    chance, law = _residual(reach, p, rest)
    return chance * 0.9999, law


PLANTED = {
    "block: a little less": (BlockVerification(), block, "residual_batch", a_little_less),
    "traversal: a little less": (TraversalVerification(), traversal, "residual_batch", a_little_less),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, monkeypatch):
    rule, owner, name, wrong = PLANTED[fault]
    monkeypatch.setattr(owner, name, wrong)
    assert wrong_thresholds(rule, torch.float64, range(6))[0] > 0
