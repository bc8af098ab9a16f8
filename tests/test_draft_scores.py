"""Scores of a draft that are no logits, and trees that are none, are told: whatever the tree, the sampling and the engine."""

from dataclasses import replace

import pytest
import torch
from small_drafters import Edited
from tiny_models import PROMPTS, VOCAB, llama

import specdec
from specdec import DraftTree, Graphs, Law, Sampling
from specdec.drafters import Fallback, ModelDrafter, NgramDrafter
from specdec.testing import Tape
from specdec.trees import Chain, Dynamic, Static, TreePolicy, Widths
from specdec.trees.base import TreeRun

torch.set_num_threads(1)

TREES = {
    "chain": Chain(3),
    "widths": Widths([2, 2]),
    "widths of points": Widths([2, 2], Law.POINT),
    "without replacement": Widths([2, 1], Law.WITHOUT_REPLACEMENT),
    "static": Static([-1, 0, 0, 1]),
    "dynamic": Dynamic(6, 2, 2),
    "dynamic by threshold": Dynamic(6, 2, 2, threshold=0.05),
}
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(1.0), "nucleus": Sampling(1.0, top_p=0.9)}


class Spoilt(ModelDrafter):
    """A draft model whose logits are changed by `edit(logits)`."""

    def __init__(self, edit, tree=None, model=None):
        super().__init__(llama(1) if model is None else model, tree)
        self.edit = edit

    def start(self, target, batch, last=None):
        run = super().start(target, batch)
        score = run.score
        run.score = lambda frontier: self.edit(score(frontier))
        return run


def at_token(value, row=None):
    """Edit: one token's logit, in one row or in all."""

    def edit(logits):
        logits = logits.clone()
        logits[slice(None) if row is None else row, :, 7] = value
        return logits

    return edit


NO_LAWS = {
    "nan": (at_token(torch.nan), [0, 1, 2, 3]),
    "nan in one row": (at_token(torch.nan, 1), [1]),
    "inf": (at_token(torch.inf, 2), [2]),
    "-inf for all tokens": (lambda logits: torch.full_like(logits, -torch.inf), [0, 1, 2, 3]),
}


# every case and sampling with one tree, and every other tree with the case and the sampling that hide most
NO_LAW_RUNS = [(case, "chain", sampling) for case in NO_LAWS for sampling in SAMPLINGS]
NO_LAW_RUNS += [("nan in one row", tree, "nucleus") for tree in TREES if tree != "chain"]


@pytest.mark.parametrize(("case", "tree", "sampling"), NO_LAW_RUNS)
def test_logits_of_a_draft_that_give_no_law_are_told_with_their_prompts(case, tree, sampling):
    edit, rows = NO_LAWS[case]
    options = {"sampling": SAMPLINGS[sampling], "max_new_tokens": 12, "stop_tokens": ()}
    with pytest.raises(ValueError, match="the draft model's weights") as told:
        specdec.generate(llama(), PROMPTS, Spoilt(edit, TREES[tree]), **options)
    assert f"trees for text(s) {rows} that" in str(told.value)
    with pytest.raises(ValueError, match=r"trees for text\(s\) \[\d.*the draft model's weights"):
        specdec.generate(llama(), PROMPTS, Fallback(NgramDrafter(2), Spoilt(edit, TREES[tree])), **options)


@pytest.mark.filterwarnings("ignore:engine. the stage")
@pytest.mark.parametrize("tree", ["chain", "widths of points", "dynamic"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draft_that_breaks_after_it_was_captured_is_told(tree, sampling):
    """A replayed stage runs no Python: what tells of NaN must be captured with it."""
    model = llama(1)
    target, drafter, engine = specdec.ModelTarget(llama()), ModelDrafter(model, TREES[tree]), Graphs(capture=Tape)
    options = {"sampling": SAMPLINGS[sampling], "stop_tokens": (), "engine": engine, "seed": 3}
    steps = specdec.stream(target, PROMPTS, drafter, max_new_tokens=40, **options)
    for _ in range(6):
        next(steps)
    assert engine.captured
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"text\(s\) \[0, 1, 2, 3\].*the draft model's weights"):
        next(steps)


WRONG = {
    "vocabulary": (lambda logits: logits[..., :9], r"ModelDraftRun.score returned \[4, 1, 9\], not .* = \[4, 1, 50\]"),
    "count": (lambda logits: logits[:, :0], r"ModelDraftRun.score returned \[4, 0, 50\], not .* = \[4, 1, 50\]"),
    "batch": (lambda logits: logits[:1], r"ModelDraftRun.score returned \[1, 1, 50\], not .* = \[4, 1, 50\]"),
    "rank": (lambda logits: logits[:, 0], r"ModelDraftRun.score returned \[4, 50\], not \[batch, count, vocab\]"),
    "integers": (lambda logits: logits.long(), r"ModelDraftRun.score returned torch.int64; .* return float32"),
    "device": (lambda logits: logits.to("meta"), "ModelDraftRun.score returned logits on meta; return them on cpu"),
    "nothing": (lambda logits: None, r"what ModelDraftRun.score returned is a NoneType; return a tensor \[batch, count,"),
    "a list": (lambda logits: logits.tolist(), r"what ModelDraftRun.score returned is a list; return a tensor"),
}  # fmt: skip


WRONG_RUNS = [(case, "chain", "eager") for case in WRONG]
WRONG_RUNS += [("vocabulary", tree, engine) for tree in TREES for engine in ("eager", "graph")][1:]


@pytest.mark.filterwarnings("ignore:engine. the stage")
@pytest.mark.parametrize(("case", "tree", "engine"), WRONG_RUNS)
def test_scores_of_another_form_are_refused(case, tree, engine):
    edit, cure = WRONG[case]
    with pytest.raises(ValueError, match=cure):
        specdec.generate(llama(), PROMPTS, Spoilt(edit, TREES[tree]), max_new_tokens=12, engine=engine)


@pytest.mark.parametrize("tree", TREES)
def test_scores_in_another_precision_and_with_tokens_ruled_out_are_a_law(tree):
    def edit(logits):
        return logits.double().masked_fill(torch.arange(VOCAB) % 2 == 0, -torch.inf)

    expected = specdec.generate(llama(), PROMPTS, max_new_tokens=12).tokens
    found = specdec.generate(llama(), PROMPTS, Spoilt(edit, TREES[tree]), max_new_tokens=12).tokens
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


FORMS = {
    "nothing": (lambda tree: None, "what ModelDraftRun proposed is a NoneType; pass a specdec DraftTree"),
    "float tokens": (lambda t: replace(t, tokens=t.tokens.float()), "tokens of torch.float32, not torch.int64"),
    "other laws": (lambda t: replace(t, laws=t.laws.long()), "laws of torch.int64, not torch.uint8"),
    "integer probabilities": (
        lambda t: DraftTree(t.tokens, t.topology, t.laws, t.draft_probs.long()),
        "draft_probs of torch.int64, not of floating-point numbers",
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_trees_of_another_form_are_refused(case):
    edit, cure = FORMS[case]
    with pytest.raises(ValueError, match=cure):
        drafter = Edited(ModelDrafter(llama(1), Chain(3)), edit)
        specdec.generate(llama(), PROMPTS, drafter, sampling=Sampling(1.0), max_new_tokens=8)


class Yields(TreePolicy):
    def __init__(self, what):
        self.what = what

    def spec(self, sampling):
        return Chain(2).spec(sampling)

    def start(self, batch, last=None):
        return YieldsRun(self, batch)


class YieldsRun(TreeRun):
    def grow(self, coins):
        if self.policy.what is not None:
            yield self.policy.what


@pytest.mark.parametrize(
    ("what", "cure"),
    [(3, "what YieldsRun.grow yielded is a int"), (None, "what YieldsRun.grow returned is a NoneType")],
)
def test_what_a_policy_yields_and_returns_is_looked_at(what, cure):
    with pytest.raises(ValueError, match=cure):
        specdec.generate(llama(), PROMPTS, ModelDrafter(llama(1), Yields(what)), max_new_tokens=8)
