"""The fast path of every rule makes the decisions of its specification on the same coins."""

import pytest
import torch

from specdec import Coins, Law, Sampling
from specdec.rules import Rule, SiblingRejection
from specdec.sampling import TargetLaw
from specdec.testing import Table, TabularDrafter
from specdec.trees import Chain, Dynamic, Widths

TREES = [
    Chain(4),
    Widths((3, 2, 2), Law.IID),
    Widths((3, 2, 2), Law.WITHOUT_REPLACEMENT),
    Widths((3, 2, 2), Law.SAMPLED_THEN_TOP),
    Widths((8, 2), Law.SAMPLED_THEN_TOP),  # wider than the vocabulary's support under top-k: padding
    Dynamic(10, 3, 3),
]


class Batch:
    """A context of random texts, as much of it as drafters and laws look at."""

    def __init__(self, rows: int, vocab: int, sampling: Sampling, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.host_lengths = torch.randint(1, 4, (rows,), generator=generator).tolist()
        self.lengths = torch.tensor(self.host_lengths)
        self.tokens = torch.randint(0, vocab, (rows, 30), generator=generator)
        self.root = self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]
        self.max_depth, self.row_depths = 8, torch.full((rows,), 8)
        self.sampling, self.processors = sampling, [()] * rows


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.0, top_p=0.8)], ids=str
)
@pytest.mark.parametrize("tree", TREES, ids=lambda t: f"{type(t).__name__}_{getattr(t, 'law', Law.POINT).name}")
def test_the_fast_path_of_sibling_rejection_equals_its_specification(tree, sampling):
    vocab, rows, rule = 9, 24, SiblingRejection()
    for seed in range(8):
        context = Batch(rows, vocab, sampling, seed)
        coins = Coins(seed, rows, 64)
        drafted = TabularDrafter(Table(vocab, seed=1), tree).propose(context, coins)
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, drafted.tokens.shape[1], vocab, dtype=torch.float64, generator=generator) * 2
        fast = rule.decide_batch(drafted, TargetLaw(logits, drafted, context), coins)
        slow = Rule.decide_batch(rule, drafted, TargetLaw(logits, drafted, context), coins)
        assert torch.equal(fast.accepted, slow.accepted)
        assert torch.equal(fast.token, slow.token)
        kept = torch.arange(fast.path.shape[1]) <= fast.accepted[:, None]
        assert torch.equal(fast.path * kept, slow.path * kept)


def test_coins_are_uniform_and_a_function_of_their_key_alone():
    coins, other = Coins(3, 4, 16), Coins(3, 2, 5)
    values = []
    for step in range(100):
        coins.step = other.step = step
        for purpose in range(3):
            assert torch.equal(coins.uniforms(purpose)[:2, :5], other.uniforms(purpose))
            values.append(coins.uniforms(purpose).flatten())
    values = torch.cat(values)
    assert values.unique().numel() == values.numel()
    assert abs(float(values.mean()) - 0.5) < 0.01  # 19,200 uniforms: the mean's standard deviation is 0.002
