"""Every drafter keeps the contract, and broken ones are told so."""

import doctest
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from small_drafters import Edited, Proposing
from tiny_models import llama

import specdec
from specdec import Law, TreeSpec
from specdec.drafters import (
    Fallback,
    LayerSkipDrafter,
    MedusaDrafter,
    MedusaHeads,
    ModelDrafter,
    NgramDrafter,
    SuffixDrafter,
    TreeDrafter,
    TreeDraftRun,
)
from specdec.rules import KSeq, LevelVerification
from specdec.testing import Table, TabularDrafter, TabularTarget, assert_drafter, exact_law
from specdec.testing.drafters import Noting, assert_by_depth
from specdec.tree import DraftTree, tree_of_points
from specdec.trees import Chain, Dynamic, Static, Widths

torch.set_num_threads(1)
PROMPTS = [(0, 1, 0, 1), (1, 0), (2, 2, 1, 0, 1, 2)]


def tiny(seed, layers=1):
    return llama(seed, vocab_size=3, hidden_size=16, head_dim=4, eos_token_id=None, num_hidden_layers=layers)


def heads():
    made = MedusaHeads(2, 1, 16).double()
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():
        p.data.normal_(0, 0.5, generator=generator)
    return made


DRAFTERS = {
    "ngram": lambda: NgramDrafter(3, branches=2),
    "suffix": lambda: SuffixDrafter(6, 3, 2),
    "chain": lambda: ModelDrafter(tiny(1), Chain(2)),
    "widths": lambda: ModelDrafter(tiny(1), Widths((2, 1))),
    "static": lambda: ModelDrafter(tiny(1), Static([-1, 0, 0, 2], Law.WITHOUT_REPLACEMENT)),
    "dynamic": lambda: ModelDrafter(tiny(1), Dynamic(5, 2, 2)),
    "dynamic, by threshold": lambda: ModelDrafter(tiny(1), Dynamic(5, 2, 2, threshold=0.3)),
    "layer skip": lambda: LayerSkipDrafter(exit_layer=1, tree=Widths((2, 1))),
    "medusa": lambda: MedusaDrafter(heads(), Widths((2, 1))),
    "fallback": lambda: Fallback(SuffixDrafter(threshold=0.5), ModelDrafter(tiny(1), Chain(2))),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_contract_is_kept(name):
    assert_drafter(DRAFTERS[name](), tiny(0, layers=2), PROMPTS)


class LastToken(TreeDrafter):
    """Draws from a table of which token follows which."""

    def start(self, target, batch, last=None):
        return LastTokenRun(self, batch)


class LastTokenRun(TreeDraftRun):
    def score(self, frontier):
        return torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 3.0]])[frontier.tokens]


@pytest.mark.parametrize("tree", [None, Widths((2, 1)), Static([-1, 0, 0, 2], Law.IID), Dynamic(5, 2, 2)], ids=str)
def test_a_drafter_that_says_what_follows_a_node_grows_any_tree(tree):
    assert_drafter(LastToken(tree), TabularTarget(3, seed=2), PROMPTS)


TAKE_A_TREE = {
    "model": lambda tree: ModelDrafter(tiny(1), tree),
    "layer skip": lambda tree: LayerSkipDrafter(exit_layer=1, tree=tree),
    "medusa": lambda tree: MedusaDrafter(heads(), tree),
    "table": lambda tree: TabularDrafter(Table(3), tree),
}


@pytest.mark.parametrize("name", TAKE_A_TREE)
def test_what_is_no_tree_policy_is_refused(name):
    for tree in (4, [4, 2], Chain):
        with pytest.raises(ValueError, match=f"tree is a {type(tree).__name__}; pass a tree policy such as Chain"):
            TAKE_A_TREE[name](tree)


class Curious(Proposing):
    """Drafts the last token of the next row."""

    def spec(self, sampling):
        return TreeSpec(frozenset({Law.POINT}), 2, 1, 1)

    def propose(self, batch, coins):
        tokens = batch.root.roll(1).tolist()
        return tree_of_points(batch.root, [[(token, 0)][: batch.max_depth] for token in tokens])


class Forgetful(Curious):
    """Drafts the last token of the prompt, whatever the loop emitted since."""

    def start(self, target, batch, last=None):
        run, roots = super().start(target, batch), batch.root.tolist()
        run.propose = lambda coins: tree_of_points(batch.root, [[(token, 0)][: batch.max_depth] for token in roots])
        return run


class Leaking(Curious):
    """Drafts the first row's last token in all others."""

    def propose(self, batch, coins):
        return tree_of_points(batch.root, [[(int(batch.root[0]), 0)][: batch.max_depth] for _ in batch.texts])


class Careless(Curious):
    """Drafts without coins: of what it says nobody can know."""

    def spec(self, sampling):
        return TreeSpec(frozenset({Law.IID if sampling.temperature else Law.POINT}), 2, 1, 1)

    def propose(self, batch, coins):
        if batch.max_depth == 0 or batch.sampling.temperature == 0:
            return batch.undrafted()
        tokens = torch.stack([batch.root, torch.randint(0, batch.vocab, batch.root.shape)], 1)
        laws = torch.tensor([[Law.IID, Law.POINT]]).expand_as(tokens).to(torch.uint8)
        return DraftTree(tokens, batch.chain(2), laws, torch.ones(len(batch), 1, batch.vocab))


class Greedy(Chain):
    """Asks for more than it says."""

    def spec(self, sampling):
        return replace(super().spec(sampling), nodes=2)


def boastful(tree):
    """Says that it drew from a sharper law than it did."""
    if tree.draft_probs is not None:
        tree.draft_probs.pow_(2)
    return tree


def second_if_zero(tree, cousin=False):
    """Draws a second child of a node only where a token of the same depth is 0: the first child, or that of the first."""
    looked_at, drawn_last = (3, 6) if cousin else (1, 2)
    if tree.topology.depth < 1 + cousin:
        return tree
    laws = tree.laws.clone()
    laws[:, drawn_last] = torch.where(tree.tokens[:, looked_at] == 0, laws[:, drawn_last], Law.PADDING)
    return replace(tree, laws=laws)


BROKEN = {
    "a sibling's token": (
        Edited(TabularDrafter(Table(3, 1), Widths((2,), Law.IID)), second_if_zero),
        "promises TreeSpec.by_depth",
    ),
    "a cousin's token": (
        Edited(TabularDrafter(Table(3, 1), Widths((2, 2), Law.IID)), partial(second_if_zero, cousin=True)),
        "promises TreeSpec.by_depth",
    ),
    "forgetful": (Forgetful(), "afresh"),
    "careless": (Careless(), "changes the law|draw with `coins` only|depends on"),
    "boastful": (Edited(TabularDrafter(Table(3, 1), Chain(2)), boastful), "changes the law"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_drafters_are_told_so(name):
    drafter, complaint = BROKEN[name]
    with pytest.raises(AssertionError, match=complaint):
        assert_drafter(drafter, TabularTarget(3, seed=2), PROMPTS)


def test_a_tree_that_asks_for_more_nodes_than_it_says_is_refused():
    with pytest.raises(ValueError, match="asks for the scores of 3 nodes, but its TreeSpec allows 2"):
        specdec.generate(tiny(0), torch.tensor(PROMPTS[0]), ModelDrafter(tiny(1), Greedy(3)), max_new_tokens=8)


def test_a_drafter_that_looks_at_other_rows_is_told_so():
    with pytest.raises(AssertionError, match="depends on the other rows"):
        assert_drafter(Curious(), TabularTarget(3, seed=2), PROMPTS, horizon=40)
    with pytest.raises(AssertionError, match="depends on the other rows"):
        assert_drafter(Leaking(), TabularTarget(3, seed=2), PROMPTS, horizon=40)


@pytest.mark.parametrize(
    ("target", "prompts", "options", "cure"),
    [
        (lambda: TabularTarget(5), PROMPTS, {}, "TabularTarget(3)"),
        (lambda: tiny(0).float(), PROMPTS, {}, "call model.double()"),
        (lambda: TabularTarget(3), [(0, 1), (1, 0)], {}, "of different lengths"),
        (lambda: TabularTarget(3), PROMPTS[:1], {}, "of different lengths"),
        (lambda: TabularTarget(3), PROMPTS, {"samplings": ()}, "at least one"),
    ],
    ids=["vocabulary", "dtype", "lengths", "one prompt", "no sampling"],
)
def test_what_cannot_be_examined_is_refused(target, prompts, options, cure):
    with pytest.raises(ValueError, match=re.escape(cure)):
        assert_drafter(NgramDrafter(2), target(), prompts, **options)


POLICIES = [
    *(Widths((2, 1), law) for law in (Law.IID, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP, Law.POINT)),
    Static([-1, 0, 0, 2, 2], Law.IID),
    Dynamic(5, 2, 2),
    Dynamic(5, 2, 2, threshold=0.3),
]


@pytest.mark.parametrize("tree", POLICIES, ids=lambda tree: f"{type(tree).__name__}_{getattr(tree, 'law', '')}")
def test_trees_depend_on_no_token_of_their_own_depth_where_they_promise_so(tree):
    noting = Noting(TabularDrafter(Table(3, 1), tree))
    assert noting.spec(specdec.Sampling(1.0)).by_depth
    exact_law(TabularTarget(3, seed=2), PROMPTS[0], noting, sampling=specdec.Sampling(1.0))
    assert len(noting.drafts) > 5
    assert_by_depth(noting, noting.drafts)


@pytest.mark.parametrize("rule", [KSeq(), LevelVerification()], ids=lambda rule: type(rule).__name__)
def test_rules_that_need_it_refuse_trees_that_do_not_promise_it(rule):
    with pytest.raises(ValueError, match=r"set TreeSpec\(by_depth=True\) if it is so, or use"):
        rule.check(TreeSpec(frozenset({Law.IID}), 3, 1, 2))
    rule.check(TreeSpec(frozenset({Law.IID}), 3, 1, 2, by_depth=True))
    rule.check(TreeSpec(frozenset({Law.IID}), 3, 2, 1))  # one child alone


TABULAR = {
    "ngram": lambda: NgramDrafter(4, branches=3),
    "suffix": lambda: SuffixDrafter(nodes=9, threshold=0.02),
    "widths": lambda: TabularDrafter(Table(6, 1), Widths((2, 2, 1))),
    "static": lambda: TabularDrafter(Table(6, 1), Static([-1, 0, 0, 1, 3, 3], Law.WITHOUT_REPLACEMENT)),
    "dynamic": lambda: TabularDrafter(Table(6, 1), Dynamic(7, 3, 2)),
    "threshold": lambda: TabularDrafter(Table(6, 1), Dynamic(7, 3, 2, threshold=0.1)),
    "fallback": lambda: Fallback(NgramDrafter(4, branches=3), TabularDrafter(Table(6, 1), Chain(3))),
}


@pytest.mark.parametrize("name", TABULAR)
def test_sampled_texts_of_a_row_do_not_depend_on_its_batch(name):
    """At the end of a text rows have budgets of their own, and trees as deep as each can use."""
    target = TabularTarget(6, seed=3)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(0, 6, (20,), generator=generator) for _ in range(4)]
        options = {"sampling": specdec.Sampling(1.0), "max_new_tokens": 12, "stop_tokens": (), "seed": seed}
        together = specdec.generate(target, rows, TABULAR[name](), **options).tokens[0]
        alone = specdec.generate(target, rows[0], TABULAR[name](), **options).tokens[0]
        assert torch.equal(together, alone)


def test_example_of_tree_of_points_gives_what_it_says():
    [example] = doctest.DocTestFinder().find(tree_of_points, globs={"torch": torch, "tree_of_points": tree_of_points})
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=3)
