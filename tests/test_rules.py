"""Every rule: exact where it says so, and a fast path that decides as the specification."""

import os
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans, integers
from random_trees import SAMPLED, differing, random_trees
from small_drafters import editing

from certificates.mutants import example
from specdec import Coins, DraftTree, Law, Sampling, Topology, TreeSpec, batch
from specdec.arguments import as_request
from specdec.coins import Purpose, inverse_cdf
from specdec.rules import (
    BlockVerification,
    KSeq,
    LenientRejection,
    LevelVerification,
    Rule,
    SiblingRejection,
    TraversalVerification,
    TypicalAcceptance,
)
from specdec.target_law import LogitsLaw
from specdec.testing import Table, TabularDrafter, TabularTarget, assert_lossless, exact_law, target_law
from specdec.tree import tree_of_points
from specdec.trees import Chain, Dynamic, Widths

PROMPT = (0, 1, 0)
CASES = int(os.environ.get("SPECDEC_CONFORMANCE_CASES", "25"))  # batches per rule, of 30 rows on average
FLOAT32 = 1e-5  # how far a float32 threshold may be from the float64 one: a few roundings of a sum over the vocabulary
LOSSLESS = [SiblingRejection(), BlockVerification(), TraversalVerification(), KSeq(), LevelVerification(rounds=1)]
LOSSY = [LenientRejection(), TypicalAcceptance()]
TREES = [
    Chain(4),
    Widths((1, 1, 1), Law.WITHOUT_REPLACEMENT),
    Widths((1, 1, 1), Law.SAMPLED_THEN_TOP),
    *(Widths((3, 2, 2), law) for law in SAMPLED),
    Widths((8, 2), Law.SAMPLED_THEN_TOP),  # wider than the vocabulary's support under top-k: padding
    Dynamic(10, 3, 3),
]


def name_of(value) -> str:
    return f"{type(value).__name__}_{value.law.name}" if isinstance(value, Widths) else type(value).__name__


def admits(rule, spec) -> bool:
    try:
        rule.check(spec)
    except ValueError:
        return False
    return True


class Batch(batch.Batch):
    """Random texts, in the middle of a run."""

    def __init__(self, rows: int, vocab: int, sampling: Sampling, seed: int):
        super().__init__(rows, 30, vocab, torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 4, (rows,), generator=generator).tolist()
        prompts = [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]
        request = as_request(TabularTarget(vocab), prompts, sampling=sampling, max_new_tokens=9)
        self.begin(request, request.texts, 30)
        self.max_depth = 8


# --- fast path = specification


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.0, top_p=0.8)], ids=str
)
@pytest.mark.parametrize("tree", TREES, ids=name_of)
@pytest.mark.parametrize("rule", LOSSLESS + LOSSY, ids=name_of)
def test_the_fast_path_equals_the_specification_on_drafted_trees(rule, tree, sampling):
    if not admits(rule, tree.spec(sampling)):
        return
    vocab, rows = 9, 24
    for seed in range(3):
        context, coins = Batch(rows, vocab, sampling, seed), Coins(seed, rows, 64)
        drafted = TabularDrafter(Table(vocab, seed=1), tree).start(None, context).propose(coins)
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, drafted.tokens.shape[1], vocab, dtype=torch.float64, generator=generator) * 2
        fast = rule.decide_batch(drafted, LogitsLaw(logits, drafted, context), coins)
        slow = Rule.decide_batch(rule, drafted, LogitsLaw(logits, drafted, context), coins)
        assert not differing(fast, slow).any()


def trees_for(rule, rows: int, vocab: int, seed: int, single: bool = False) -> tuple[DraftTree, torch.Tensor]:
    """Random trees that the rule admits."""
    width = 1 if single or isinstance(rule, BlockVerification) else 3
    laws = [Law.IID] if isinstance(rule, KSeq) and width > 1 else [Law.POINT, *SAMPLED]
    return random_trees(rows, vocab, seed, width, laws)


class Shifted(Coins):
    """Coins moved by a little."""

    shift = 0.0

    def uniforms(self, purpose):
        return (super().uniforms(purpose) + self.shift).clamp(0, 1 - 1e-16)


def compare(rule, rows: int, vocab: int, seed: int, single: bool) -> None:
    """Decide random trees by the specification and by the fast path, in float64 and in float32."""
    tree, logits = trees_for(rule, rows, vocab, seed, single)
    context, coins = Batch(rows, vocab, Sampling(1.0), seed), Shifted(seed, rows, 16)
    slow = Rule.decide_batch(rule, tree, LogitsLaw(logits, tree, context), coins)
    fast = rule.decide_batch(tree, LogitsLaw(logits, tree, context), coins)
    assert not differing(fast, slow).any()
    low = replace(tree, draft_probs=tree.draft_probs.float())
    odd = differing(rule.decide_batch(low, LogitsLaw(logits.float(), low, context), coins), slow)
    assert odd.sum() <= 1
    if odd.any():  # float32 may decide otherwise only where a coin lies next to a threshold
        decisions = []
        for coins.shift in (-FLOAT32, FLOAT32):
            decisions.append(Rule.decide_batch(rule, tree, LogitsLaw(logits, tree, context), coins))
        assert not (~differing(decisions[0], slow) & ~differing(decisions[1], slow) & odd).any()


@pytest.mark.parametrize("rule", LOSSLESS + LOSSY, ids=name_of)
@settings(max_examples=CASES, deadline=None, derandomize=True)
@given(rows=integers(1, 64), vocab=integers(5, 40) | integers(41, 300), seed=integers(0, 2**32), single=booleans())
def test_the_fast_path_equals_the_specification_on_ragged_trees_of_mixed_laws(rule, rows, vocab, seed, single):
    compare(rule, rows, vocab, seed, single)


@pytest.mark.parametrize("rule", LOSSLESS + LOSSY, ids=name_of)
@pytest.mark.parametrize(("rows", "vocab"), [(8, 4000), (2, 150_000)])
def test_the_fast_path_equals_the_specification_over_a_large_vocabulary(rule, rows, vocab):
    compare(rule, rows, vocab, seed=1, single=False)


@pytest.mark.parametrize("rule", LOSSLESS + LOSSY, ids=name_of)
def test_without_a_draft_the_fast_path_samples_from_the_target(rule):
    context, coins = Batch(5, 6, Sampling(1.0), 0), Coins(0, 5, 16)
    tree, logits = tree_of_points(context.root, [[]] * 5), torch.randn(5, 1, 6, dtype=torch.float64)
    fast = rule.decide_batch(tree, LogitsLaw(logits, tree, context), coins)
    assert not differing(fast, Rule.decide_batch(rule, tree, LogitsLaw(logits, tree, context), coins)).any()
    assert torch.equal(fast.token, inverse_cdf(logits[:, 0].softmax(-1), coins.uniforms(Purpose.EMIT)[:, 0]))


class NotingLaw(LogitsLaw):
    """Notes which nodes a specification looks at."""

    def __init__(self, logits, *args):
        super().__init__(logits, *args)
        self.seen = torch.zeros(logits.shape[:2], dtype=torch.bool)

    def probabilities(self, row, node):
        self.seen[row, node] = True
        return super().probabilities(row, node)


@pytest.mark.parametrize("rule", LOSSLESS + LOSSY, ids=name_of)
def test_a_nan_at_a_node_that_the_specification_does_not_visit_is_no_error(rule):
    unseen = 0
    for seed in range(8):
        tree, logits = trees_for(rule, 16, 6, seed)
        context, coins = Batch(16, 6, Sampling(1.0), seed), Coins(seed, 16, 16)
        noting = NotingLaw(logits, tree, context)
        slow = Rule.decide_batch(rule, tree, noting, coins)
        law = LogitsLaw(logits.masked_fill(~noting.seen[..., None], torch.nan), tree, context)
        fast = rule.decide_batch(tree, law, coins)
        assert not differing(fast, slow).any()
        assert not law.invalid().any()
        unseen += int((~noting.seen).sum())
    assert unseen > 16


@pytest.mark.parametrize("rule", LOSSLESS + LOSSY, ids=name_of)
def test_the_fast_path_never_asks_the_device(rule):
    """Meta tensors have no values: whatever would wait for one (item, tolist, bool, nonzero) raises."""
    tree, logits = trees_for(rule, 4, 7, seed=1)
    context = Batch(4, 7, Sampling(1.0), 1)
    topology = Topology(tree.topology.parents.to("meta"), tree.topology.depth, tree.topology.width)
    assert tree.draft_probs is not None
    tree = DraftTree(tree.tokens.to("meta"), topology, tree.laws.to("meta"), tree.draft_probs.to("meta"))
    decisions = rule.decide_batch(tree, LogitsLaw(logits.to("meta"), tree, context), Coins(0, 4, 16, "meta"))
    assert decisions.path.shape == (4, topology.depth + 1)
    assert decisions.accepted.shape == decisions.token.shape == (4,)


# --- exactness


@pytest.mark.parametrize("rule", LOSSLESS, ids=name_of)
def test_lossless_rules_are_lossless(rule):
    assert_lossless(rule)


class Sparse(Table):
    """A table in which a third of all tokens, differing from text to text, cannot occur."""

    def logits(self, text):
        logits = super().logits(text).clone()
        logits[np.random.default_rng([self.seed, 7, *text]).random(self.vocab) < 0.34] = -torch.inf
        logits[sum(text) % self.vocab] = 0
        return logits


class SparseTarget(Sparse, TabularTarget):
    pass


class StopsAtZero(TabularDrafter):
    """Draws nothing below a token 0: a draft that is cut short by what was drawn."""

    def start(self, target, batch, last=None):
        return editing(super().start(target, batch), self._stopped)

    def _stopped(self, tree):
        zero = tree.tokens == 0
        zero[:, 0] = False
        above = tree.topology.ancestors & ~torch.eye(tree.tokens.shape[1], dtype=torch.bool)
        return replace(tree, laws=torch.where((above & zero[:, None]).any(-1), Law.PADDING, tree.laws))


def distance(rule, drafter, target, **options) -> float:
    """Total variation of what the loop generates from the target's own law."""
    options = {"sampling": Sampling(1.0), "max_new_tokens": 3, **options}
    law = exact_law(target, PROMPT, drafter, rule=rule, **options)
    return float(law.total_variation(target_law(target, PROMPT, **options)))


SMALL = [Chain(3), *(Widths(widths, law) for law in SAMPLED for widths in ((1, 1), (2, 1), (1, 2))), Dynamic(6, 2, 2)]


@pytest.mark.parametrize("tree", SMALL, ids=lambda tree: f"{name_of(tree)}_{getattr(tree, 'widths', '')}")
@pytest.mark.parametrize("rule", LOSSLESS, ids=name_of)
def test_drafts_cut_short_and_laws_with_zeros_stay_exact(rule, tree):
    if not admits(rule, tree.spec(Sampling(1.0))):
        return
    length = tree.spec(Sampling(1.0)).depth + 1
    assert distance(rule, StopsAtZero(Table(3, seed=3), tree), TabularTarget(3, seed=2), max_new_tokens=length) == 0
    assert distance(rule, TabularDrafter(Sparse(3, seed=3), tree), SparseTarget(3, seed=2), max_new_tokens=length) == 0


@pytest.mark.parametrize("law", SAMPLED, ids=lambda law: law.name)
@pytest.mark.parametrize("rule", [TraversalVerification(), SiblingRejection(), LevelVerification()], ids=name_of)
def test_trees_with_siblings_at_two_depths_are_exact(rule, law):
    assert distance(rule, TabularDrafter(Table(2, seed=3), Widths((2, 2), law)), TabularTarget(2, seed=2)) == 0


@pytest.mark.parametrize("law", SAMPLED[:2], ids=lambda law: law.name)
def test_level_verification_is_exact_for_more_siblings_than_a_pair(law):
    drafter = TabularDrafter(Table(4, seed=3), Widths((4 if law == Law.WITHOUT_REPLACEMENT else 3,), law))
    assert distance(LevelVerification(rounds=1), drafter, TabularTarget(4, seed=2), max_new_tokens=2) == 0


def test_level_verification_spreads_what_traversal_gives_to_the_first_child():
    target, drafter = TabularTarget(3, seed=2), TabularDrafter(Table(3, seed=3), Widths((2, 1), Law.IID))
    rules = (SiblingRejection(), TraversalVerification(), LevelVerification(1), LevelVerification(2))
    lengths = [exact_law(target, PROMPT, drafter, rule=rule).expected_tokens for rule in rules]
    assert lengths == sorted(lengths)
    assert lengths[2] > lengths[1] + 0.05


def test_flows_add_up_to_the_expected_number_of_accepted_tokens():
    rule, rows, target = LevelVerification(), 2000, TabularTarget(3, seed=2)
    context, coins = Batch(rows, 3, Sampling(1.0), 0), Coins(0, rows, 16)
    tree = TabularDrafter(Table(3, seed=3), Widths((2, 2), Law.IID)).start(None, context).propose(coins)
    law = LogitsLaw(target.start(context).score(tree).logits, tree, context)
    expected = rule.flows(tree, law)[:, 1:].sum(1).mean()
    assert float(rule.decide_batch(tree, law, coins).accepted.double().mean()) == pytest.approx(
        float(expected), abs=0.05
    )


def test_block_verification_accepts_as_much_as_in_the_papers_example():
    expected = {BlockVerification(): 11, TraversalVerification(): 11, SiblingRejection(): 10}
    for rule, ninths in expected.items():
        expected_tokens = example(rule).certify()["expected_tokens"]
        assert expected_tokens - 1 == pytest.approx(Fraction(ninths, 9), abs=1e-12)  # the softmax rounds thirds


@pytest.mark.parametrize("law", [Law.POINT, *SAMPLED], ids=lambda law: law.name)
@pytest.mark.parametrize("tree_rule", [TraversalVerification(), LevelVerification()], ids=name_of)
def test_rules_for_trees_are_block_verification_on_chains(tree_rule, law):
    block_rule = BlockVerification()
    for seed in range(20):
        tree, logits = trees_for(block_rule, 16, 6, seed)
        kinds = torch.where((tree.laws == Law.PADDING) | (tree.laws == Law.POINT), tree.laws, law).to(torch.uint8)
        tree = replace(tree, laws=kinds)
        context, coins = Batch(16, 6, Sampling(1.0), seed), Coins(seed, 16, 16)
        for decide in (Rule.decide_batch, lambda rule, *args: rule.decide_batch(*args)):
            one, other = (
                decide(rule, tree, LogitsLaw(logits, tree, context), coins) for rule in (block_rule, tree_rule)
            )
            assert not differing(one, other).any()


# --- what rules refuse and what they do not claim


@pytest.mark.parametrize("rule", LOSSY, ids=name_of)
def test_lossy_rules_claim_nothing_and_are_biased(rule):
    with pytest.raises(AssertionError, match="does not claim to be lossless"):
        assert_lossless(rule)
    assert distance(rule, TabularDrafter(Table(3, seed=1), Chain(2)), TabularTarget(3, seed=0)) > 0.05


def test_full_lenience_is_sibling_rejection_and_typical_acceptance_is_exact_when_greedy():
    drafter, target = TabularDrafter(Table(3, seed=1), Widths((2, 1), Law.IID)), TabularTarget(3, seed=0)
    assert distance(LenientRejection(1), drafter, target) < 1e-15  # the lenience is a float
    assert distance(TypicalAcceptance(), drafter, target, sampling=Sampling()) == 0


def test_rules_refuse_what_they_cannot_do_and_name_the_cure():
    with pytest.raises(ValueError, match="use TraversalVerification"):
        BlockVerification().check(TreeSpec(frozenset({Law.IID}), nodes=4, depth=2, width=2))
    with pytest.raises(ValueError, match=r"WITHOUT_REPLACEMENT children: draft Widths\(\.\.\., law=Law\.IID\)"):
        KSeq().check(TreeSpec(frozenset({Law.WITHOUT_REPLACEMENT}), nodes=4, depth=2, width=2))
    with pytest.raises(ValueError, match="lenience=0"):
        LenientRejection(0)
    with pytest.raises(ValueError, match="epsilon=2"):
        TypicalAcceptance(epsilon=2)


# --- coins


def test_coins_are_uniform_and_a_function_of_their_key_alone():
    coins, other = Coins(3, 4, 16), Coins(3, 2, 5)
    values = []
    for _ in range(100):
        for purpose in range(3):
            assert torch.equal(coins.uniforms(purpose)[:2, :5], other.uniforms(purpose))
            values.append(coins.uniforms(purpose).flatten().clone())
        coins.advance()
        other.advance()
    values = torch.cat(values)
    assert values.unique().numel() == values.numel()
    assert abs(float(values.mean()) - 0.5) < 0.01  # 19,200 uniforms: the mean's standard deviation is 0.002


class DepthFirst(TabularDrafter):
    """Draws a second child of the root only if the first one's child is token 0: growth may depend on what was drawn."""

    def __init__(self, by_depth=False):
        super().__init__(Table(3, seed=3), Widths((2, 1), Law.IID))
        self.by_depth = by_depth

    def spec(self, sampling):
        return replace(super().spec(sampling), by_depth=self.by_depth)

    def start(self, target, batch, last=None):
        return editing(super().start(target, batch), self._pruned)

    def _pruned(self, tree):
        if tree.tokens.shape[1] < 5:
            return tree
        gone = torch.where(tree.tokens[:, 3:4] != 0, Law.PADDING, tree.laws)
        return replace(tree, laws=torch.stack([*tree.laws[:, :2].T, gone[:, 2], tree.laws[:, 3], gone[:, 4]], 1))


@pytest.mark.parametrize("rule", [SiblingRejection(), TraversalVerification()], ids=name_of)
def test_growth_that_depends_on_deeper_tokens_is_exact(rule):
    assert distance(rule, DepthFirst(), TabularTarget(3, seed=2)) == 0


def test_level_verification_refuses_such_growth_for_it_would_be_biased():
    with pytest.raises(ValueError, match="use TraversalVerification"):
        distance(LevelVerification(), DepthFirst(), TabularTarget(3, seed=2))
    assert distance(LevelVerification(), DepthFirst(by_depth=True), TabularTarget(3, seed=2)) > 1e-3
