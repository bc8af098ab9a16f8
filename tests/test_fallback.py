"""Two drafters in one: each row has the first that drafts for it, and each drafter's state stays right."""

from itertools import zip_longest

import pytest
import torch
from small_drafters import Proposing
from tiny_models import PROMPTS, VOCAB, llama, reference

import specdec
from specdec import Law, Sampling, TreeSpec
from specdec.drafters import Fallback, LayerSkipDrafter, ModelDrafter, NgramDrafter, SuffixDrafter
from specdec.testing import Table, TabularDrafter, TabularTarget, Tape, exact_law, target_law
from specdec.testing.drafters import Noting
from specdec.tree import tree_of_points
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)


def pairs(draft):
    return [
        Fallback(NgramDrafter(4, branches=2), ModelDrafter(draft, Widths((2, 2)))),
        Fallback(SuffixDrafter(threshold=0.4), ModelDrafter(draft, Dynamic(8, 3, 2))),
        Fallback(SuffixDrafter(), Fallback(NgramDrafter(), LayerSkipDrafter(exit_layer=2))),
        Fallback(ModelDrafter(draft, Chain(2)), NgramDrafter(3)),
    ]


@pytest.mark.parametrize("which", range(4))
def test_greedy_text_equals_transformers_generate(which):
    model = llama()
    out = specdec.generate(model, PROMPTS, pairs(llama(1))[which], max_new_tokens=48, stop_tokens=())
    expected = [reference(model, p, max_new_tokens=48, eos_token_id=-1).tolist() for p in PROMPTS]
    assert [t.tolist() for t in out.tokens] == expected


@pytest.mark.parametrize("which", range(4))
def test_a_row_does_not_depend_on_the_other_rows(which):
    model, drafter = llama(), pairs(llama(1))[which]
    options = {"sampling": Sampling(1.0), "seed": 5, "max_new_tokens": 32, "stop_tokens": ()}
    alone = specdec.generate(model, PROMPTS[0], drafter, **options).tokens[0]
    assert torch.equal(specdec.generate(model, PROMPTS, drafter, **options).tokens[0], alone)


def test_the_second_drafter_knows_the_text_that_the_first_drafted():
    model = llama()  # it drafts for itself, so whatever it drafts must be accepted whoever drafted before
    drafter = Fallback(SuffixDrafter(), ModelDrafter(model, Chain(3)))
    model_only = ModelDrafter(model, Chain(3))
    noting = Noting(drafter.second)
    drafter.second = noting
    out = specdec.generate(model, PROMPTS[3], drafter, max_new_tokens=48, stop_tokens=())
    trees = [len(draft.text) for draft in noting.drafts]
    assert 0 < len(trees) < len(out.trace.steps)
    lengths = [n for n, step in zip(_lengths(out), out.trace.steps, strict=True) if step.accepted[0] == 3]
    assert set(trees[:-1]) <= set(lengths)
    specdec.generate(model, PROMPTS[3], model_only, max_new_tokens=8)


def _lengths(out):
    length = len(PROMPTS[3])
    for step in out.trace.steps:
        yield length
        length += step.emitted[0]


@pytest.mark.parametrize("law", [Law.IID, Law.SAMPLED_THEN_TOP, Law.POINT])
@pytest.mark.parametrize("merge", [True, False])
def test_sampled_text_is_lossless(law, merge):
    options = {"sampling": Sampling(1.0), "max_new_tokens": 3, "stop_tokens": (1,)}
    drafter = Fallback(NgramDrafter(2, max_ngram=1), TabularDrafter(Table(2, 5), Widths((2,), law)))
    law = exact_law(TabularTarget(2), (0, 0, 1), drafter, merge=merge, **options)
    assert law.total_variation(target_law(TabularTarget(2), (0, 0, 1), **options)) == 0


@pytest.mark.parametrize("nested", [False, True])
def test_texts_at_once_may_share_their_drafters(nested):
    model, shared = llama(), ModelDrafter(llama(1))
    drafter = Fallback(NgramDrafter(), shared)
    drafter = Fallback(SuffixDrafter(), drafter) if nested else drafter
    options = {"max_new_tokens": 24, "stop_tokens": ()}
    calls = [(PROMPTS[3], drafter), (PROMPTS[2], drafter), (PROMPTS[3], shared)]
    expected = [specdec.generate(model, *call, **options).tokens[0].tolist() for call in calls]
    found = [[] for _ in calls]
    for news in zip_longest(*(specdec.stream(model, *call, **options) for call in calls)):
        for text, step in zip(found, news, strict=True):
            text.extend([] if step is None else step[0].tolist())
    assert found == expected


class Uneven(Proposing):
    """Drafts the target's own text for the first row; for the second a wrong token, and later nothing."""

    def __init__(self, text, until):
        self.text, self.until = text, until

    def spec(self, sampling):
        return TreeSpec(frozenset({Law.POINT}), nodes=5, depth=4, width=1)

    def propose(self, batch, coins):
        first, second = batch.host_lengths
        right = self.text[first : first + min(4, batch.max_depth)]
        wrong = [(VOCAB - 1, 0)] if second < self.until and batch.max_depth else []
        return tree_of_points(batch.root, [[(token, i) for i, token in enumerate(right)], wrong])


def test_the_first_drafter_may_draft_more_than_the_second_ever_does():
    model, prompts = llama(), [torch.tensor([5]), torch.arange(1, 30)]
    options = {"max_new_tokens": 40, "stop_tokens": ()}
    expected = specdec.generate(model, prompts, **options).tokens
    drafter = Fallback(Uneven([5, *expected[0].tolist()], until=36), ModelDrafter(model, Chain(1)))
    out = specdec.generate(model, prompts, drafter, **options)
    assert all(map(torch.equal, out.tokens, expected))
    assert max(step.nodes for step in out.trace.steps) == 5


@pytest.mark.filterwarnings("ignore:engine. the stage .* runs step by step")
def test_what_the_second_drafter_missed_is_read_in_few_shapes_where_shapes_are_compiled():
    model, draft, counts = llama(), llama(), []
    draft.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    texts, read = [], []
    for engine in ("eager", specdec.Graphs(capture=Tape)):
        counts.clear()
        drafter = Fallback(SuffixDrafter(), ModelDrafter(draft, Chain(3)))
        out = specdec.generate(model, PROMPTS[3], drafter, max_new_tokens=48, stop_tokens=(), engine=engine)
        texts.append(out.tokens[0])
        read.append(set(counts[1:]))  # the first is the prompt
    assert torch.equal(*texts)
    assert not read[0] <= {1, 2, 4, 8, 16} and {1, 2} < read[1] <= {1, 2, 4, 8, 16}
