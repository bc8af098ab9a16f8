"""Two drafters in one: each row has the first that drafts for it, and each drafter's state stays right."""

import pytest
import torch
from tiny_models import PROMPTS, llama, reference

import specdec
from specdec import Law, Sampling
from specdec.drafters import Fallback, LayerSkipDrafter, ModelDrafter, NgramDrafter, SuffixDrafter
from specdec.testing import Table, TabularDrafter, TabularTarget, exact_law, target_law
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
    trees = []
    propose = drafter.second.propose

    def listen(context, coins):
        trees.append(context.host_lengths[0])
        return propose(context, coins)

    drafter.second.propose = listen
    out = specdec.generate(model, PROMPTS[3], drafter, max_new_tokens=48, stop_tokens=())
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
