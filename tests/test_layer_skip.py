"""Self-speculation by skipping layers: the target's text on every model, and the model left as it was found."""

from itertools import islice

import pytest
import torch
from tiny_models import GATE, MATRIX, PROMPTS, llama, reference, state

import specdec
from specdec import Law, Sampling
from specdec.drafters import LayerSkipDrafter, NgramDrafter
from specdec.models.cache import GENERATE_CACHE
from specdec.models.states import decoder_layers
from specdec.testing import TabularTarget, exact_law, target_law
from specdec.trees import Chain, Dynamic, Widths
from specdec.trees.base import TreeRun

torch.set_num_threads(1)
LLAMA_TV = 1e-12  # float64 logits of one text differ by 1e-15 between batch shapes
SHARED = "gemma3n_shared_layers", "gemma4_shared_unequal_layers"  # only layers 2 and 3 of these may be skipped
MODELS = {**GATE, **MATRIX}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_equals_transformers_generate(name):
    model = MODELS[name]()
    last = len(decoder_layers(model)) - 1
    found = state(model)
    for drafter in (LayerSkipDrafter(exit_layer=last), LayerSkipDrafter(skip=[last - 1], tree=Dynamic(8, 3, 2))):
        out = specdec.generate(model, PROMPTS, drafter, max_new_tokens=24)
        assert [t.tolist() for t in out.tokens] == [reference(model, p).tolist() for p in PROMPTS]
        assert state(model) == found
        if name in SHARED:
            break


def test_a_beam_larger_than_its_tree_stays_within_its_row():
    model, prompts = llama(), [PROMPTS[2].repeat(4), PROMPTS[0]]  # the slots after the longest text are the next row's
    drafter = LayerSkipDrafter(exit_layer=1, tree=Dynamic(nodes=4, depth=8, width=6))
    out = specdec.generate(model, prompts, drafter, max_new_tokens=24, stop_tokens=())
    assert all(map(torch.equal, out.tokens, specdec.generate(model, prompts, max_new_tokens=24, stop_tokens=()).tokens))


@pytest.mark.parametrize(
    "tree", [Chain(2), Widths((2, 1)), Widths((2, 1), Law.WITHOUT_REPLACEMENT), Dynamic(5, 2, 2)], ids=str
)
def test_sampled_text_is_lossless(tree):
    model = llama(vocab_size=3, hidden_size=16, head_dim=4, eos_token_id=None, num_hidden_layers=2)
    options = {"sampling": Sampling(1.0), "max_new_tokens": 3, "stop_tokens": (2,)}
    law = exact_law(model, (0, 1, 0), LayerSkipDrafter(exit_layer=1, tree=tree), **options)
    assert float(law.total_variation(target_law(model, (0, 1, 0), **options))) <= LLAMA_TV


def test_drafts_are_those_of_the_model_without_the_skipped_layers():
    model, prompt = llama(), PROMPTS[2]
    drafter, shallow = LayerSkipDrafter(skip=[1], tree=Chain(1)), llama()
    shallow.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    out = specdec.generate(model, prompt, drafter, max_new_tokens=12, stop_tokens=(), trace="laws")
    text, new = prompt.tolist(), iter(out.tokens[0].tolist())
    for step in out.trace.steps[:-1]:
        # of what is before the root the cache holds what the whole model wrote
        full = model.model(torch.tensor([text[:-1]]), use_cache=True)[GENERATE_CACHE]
        expected = shallow(torch.tensor([text[-1:]]), **{GENERATE_CACHE: full}).logits[0, -1].argmax()
        assert step.record.bare.tokens[0, 1] == int(expected)
        text += islice(new, step.emitted[0])
    assert len(out.trace.steps) > 3


def test_a_better_draft_is_accepted_more_often():
    model = llama(num_hidden_layers=4)
    lengths = [
        specdec.generate(model, PROMPTS, LayerSkipDrafter(exit_layer=e), max_new_tokens=32, stop_tokens=()).summary()
        for e in (1, 3)
    ]
    assert lengths[0]["acceptance_length"] < lengths[1]["acceptance_length"]


BAD = {
    "nothing skipped": (LayerSkipDrafter(), "at least one"),
    "nothing kept": (LayerSkipDrafter(exit_layer=0), "keep at least one"),
    "no such layer": (LayerSkipDrafter(skip=[7]), "layers 0 to 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sets_are_refused(case):
    drafter, cure = BAD[case]
    with pytest.raises(ValueError, match=cure):
        specdec.generate(llama(), PROMPTS, drafter)


def test_targets_without_layers_are_refused():
    with pytest.raises(ValueError, match="layers to skip"):
        specdec.generate(TabularTarget(3), torch.tensor([1]), LayerSkipDrafter(exit_layer=1), max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot be skipped"):
        specdec.generate(MATRIX["gemma3n_shared_layers"](), PROMPTS, LayerSkipDrafter(skip=[0]))


def test_the_model_is_whole_again_after_a_failure():
    model = llama()
    found = state(model)

    class Failing(Chain):
        def start(self, batch, last=None):
            return FailingRun(self, batch)

    class FailingRun(TreeRun):
        def grow(self, coins):
            yield from Chain(2).start(self.batch).grow(coins)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        specdec.generate(model, PROMPTS, LayerSkipDrafter(skip=[1], tree=Failing(2)))
    assert state(model) == found
    assert [t.tolist() for t in specdec.generate(model, PROMPTS, NgramDrafter(2), max_new_tokens=24).tokens] == [
        reference(model, p).tolist() for p in PROMPTS
    ]
