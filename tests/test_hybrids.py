"""Models with recurrent state: texts are those of `model.generate`, whatever drafts for them and beside which rows."""

import copy
from dataclasses import replace

import pytest
import torch
from hybrid_models import CONVOLUTION, GATED_DELTA, HYBRIDS, REFUSED, SCAN, STATE_SPACE, disturbed
from test_medusa import heads
from test_models import WRONG, Walk
from tiny_models import PROMPTS, llama, reference, state

import specdec
from specdec.drafters import LayerSkipDrafter, MedusaDrafter, ModelDrafter, NgramDrafter, SuffixDrafter
from specdec.models import recurrences
from specdec.models.attention import View
from specdec.models.cache import TreeCache
from specdec.models.cached_model import CachedModel
from specdec.models.ready import UnsupportedModel
from specdec.models.recurrent import RecurrentLayer
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
DTYPES = (torch.float32, torch.float64)
TOKENS = 12
ONE_OF_EACH = [next(iter(family)) for family in (GATED_DELTA, STATE_SPACE, SCAN, CONVOLUTION)]

# Largest difference of a logit from the plain model's, as a fraction of the largest logit. transformers' functions for
# recurrences compute in float32 in models of any dtype.
TOLERANCE = 1e-4


def assert_text_of_transformers(model, drafter, prompts=PROMPTS, tokens=TOKENS):
    out = specdec.generate(model, prompts, drafter, max_new_tokens=tokens)
    expected = [reference(model, prompt, max_new_tokens=tokens).tolist() for prompt in prompts]
    assert [text.tolist() for text in out.tokens] == expected
    return out.summary()["acceptance_length"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HYBRIDS)
def test_greedy_text_equals_transformers_generate(name, dtype):
    model = HYBRIDS[name](dtype)
    draft, left = disturbed(model), state(model)
    assert assert_text_of_transformers(model, None) == 1
    assert assert_text_of_transformers(model, ModelDrafter(draft, Chain(3))) > 1.3
    assert assert_text_of_transformers(model, ModelDrafter(draft, Widths([2, 1]))) > 1.3
    assert_text_of_transformers(model, NgramDrafter())
    for prompt in PROMPTS[1:3]:
        assert_text_of_transformers(model, ModelDrafter(draft, Widths([2, 1])), [prompt])
    assert state(model) == left


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear", "mamba2", "mamba"])
def test_prompts_longer_than_a_chunk_are_read_beside_short_ones(name, dtype):
    made = torch.Generator().manual_seed(0)
    prompts = [torch.randint(8, 50, (length,), generator=made) for length in (70, 3, 150)]
    assert_text_of_transformers(HYBRIDS[name](dtype), NgramDrafter(), prompts, tokens=4)


@pytest.mark.parametrize("name", HYBRIDS)
def test_ragged_trees_in_one_forward_equal_their_paths(name):
    assert max(Walk(HYBRIDS[name](), steps=4).differences()) < TOLERANCE


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "lfm2"])
def test_in_bfloat16_trees_are_as_near_to_their_paths_as_rounding_lets_them_be(name, autocast):
    """Of Mamba the plain model is no measure: over many tokens transformers rounds its state to bfloat16 at each."""
    model = HYBRIDS[name](torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert max(Walk(model, steps=2).differences()) < 0.15


def with_bound(model):
    """The model with a bound on the step of its recurrence that matters everywhere."""
    for part in model.modules():
        if hasattr(part, "time_step_limit"):
            part.time_step_limit = 30.0, torch.inf
    return model


@pytest.mark.parametrize("name", STATE_SPACE)
def test_a_step_that_is_bounded_in_prompts_alone_is_bounded_there_and_nowhere_else(name):
    model, free = with_bound(HYBRIDS[name]()), HYBRIDS[name]()
    with torch.inference_mode():
        bounded, unbounded = (each(PROMPTS[2][None]).logits for each in (model, free))
        assert (bounded - unbounded).abs().max() > WRONG * bounded.abs().max()
    assert_text_of_transformers(model, ModelDrafter(disturbed(model), Widths([2, 1])))


@pytest.mark.parametrize("name", ["nemotron_h", "mamba2"])
def test_tokens_that_were_written_have_no_bound_where_they_are_read_again(name, monkeypatch):
    """Where a drafter hears the target's states, a smaller batch reads its texts again."""
    model = with_bound(HYBRIDS[name]())
    read, forward = [], CachedModel.forward

    def noting(run, *args, entering=None, **kwargs):
        read.append(0 if entering is None else int(entering.sum()))
        return forward(run, *args, entering=entering, **kwargs)

    monkeypatch.setattr(CachedModel, "forward", noting)
    drafter = MedusaDrafter(heads(dtype=torch.float32), Widths([2, 1]))
    budgets = [4, 30, 5, 30]
    found = specdec.generate(model, PROMPTS, drafter, max_new_tokens=budgets, stop_tokens=(), batch_size=4).tokens
    expected = [
        reference(model, prompt, max_new_tokens=budget, eos_token_id=None).tolist()
        for prompt, budget in zip(PROMPTS, budgets, strict=True)
    ]
    assert [text.tolist() for text in found] == expected
    assert sum(read) > sum(len(prompt) for prompt in PROMPTS), "some were read again"


def test_a_hybrid_drafts_for_another_model_and_another_model_for_it():
    hybrids, plain = [HYBRIDS[name]() for name in ONE_OF_EACH], llama(dtype=torch.float32)
    for hybrid in hybrids:
        assert_text_of_transformers(hybrid, ModelDrafter(plain, Widths([2, 1])))
        assert_text_of_transformers(plain, ModelDrafter(hybrid, Widths([2, 1])))
    assert_text_of_transformers(hybrids[0], ModelDrafter(hybrids[1], Chain(2)))


def test_a_hybrid_draft_catches_up_after_steps_in_which_it_did_not_draft():
    model = HYBRIDS["qwen3_5"]()
    drafter = specdec.drafters.Fallback(SuffixDrafter(), ModelDrafter(disturbed(model), Chain(2)))
    prompt = torch.tensor([3, 4, 5, 6] * 5)
    assert_text_of_transformers(model, drafter, [*PROMPTS, prompt], tokens=30)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_drafts_for_itself_without_some_of_its_layers(name):
    model = HYBRIDS[name]()
    left = state(model)
    assert_text_of_transformers(model, LayerSkipDrafter(exit_layer=1, tree=Widths([2, 1])))
    assert_text_of_transformers(model, LayerSkipDrafter(skip=[0], tree=Chain(2)))
    assert state(model) == left


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_step_is_one_forward_pass_and_no_token_is_read_twice(name, monkeypatch):
    passes, forward = [], CachedModel.forward

    def counted(run, tokens, topology, *args, **kwargs):
        passes.append((tokens.shape[1], kwargs.get("entering")))
        return forward(run, tokens, topology, *args, **kwargs)

    monkeypatch.setattr(CachedModel, "forward", counted)
    monkeypatch.setattr("specdec.models.cached_model._TOKENS", 16)  # prompts are read in pieces
    out = specdec.generate(HYBRIDS[name](), PROMPTS, NgramDrafter(), max_new_tokens=TOKENS)
    assert sum(entering is None for _, entering in passes) == len(out.trace.steps)
    assert sum(int(entering.sum()) for _, entering in passes if entering is not None) == sum(
        len(p) - 1 for p in PROMPTS
    )


def plant_a_state_of_one_token_less(patch):
    keep = RecurrentLayer.keep
    patch.setattr(RecurrentLayer, "keep", lambda layer, path, count: keep(layer, path, (count - 1).clamp(min=0)))


def plant_a_state_of_stopped_rows_that_goes_on(patch):
    keep = RecurrentLayer.keep
    patch.setattr(RecurrentLayer, "keep", lambda layer, path, count: keep(layer, path, count.clamp(min=1)))


def plant_decay_that_is_applied_twice(patch):
    fold, scan = recurrences.fold_linear_attention, recurrences.fold_selective_scan

    def twice(state, key, value, decay, path, count):
        fold(state, key, value, 2 * decay, path, count)

    patch.setattr(recurrences, "fold_linear_attention", twice)
    patch.setattr(recurrences, "fold_selective_scan", lambda *args, rate, **kw: scan(*args, rate=2 * rate, **kw))


def plant_a_convolution_that_is_shifted(patch):
    windows = View.windows
    patch.setattr(View, "windows", lambda view, size: (windows(view, size) - 1).clamp(min=0))


def plant_nodes_that_see_their_siblings(patch):
    def earlier(topology):
        nodes = topology.parents.shape[1]
        return torch.ones(nodes, nodes, dtype=torch.bool).tril().expand(len(topology.parents), -1, -1)

    read = recurrences.GatedDelta.read

    def reading(own, kept, fixed, state, topology):
        shown = replace(topology)
        shown.__dict__["ancestors"] = earlier(topology)
        return read(own, kept, fixed, state, shown)

    patch.setattr(recurrences.GatedDelta, "read", staticmethod(reading))


def plant_tokens_beyond_the_end_of_a_row(patch):
    opened = TreeCache.open

    def open_all(cache, view, entering=None):
        opened(cache, view, None if entering is None else torch.full_like(entering, view.count))

    patch.setattr(TreeCache, "open", open_all)


BUGS = {
    plant_a_state_of_one_token_less: ONE_OF_EACH,
    plant_a_state_of_stopped_rows_that_goes_on: ONE_OF_EACH,
    plant_decay_that_is_applied_twice: ["qwen3_5", "kimi_linear", "mamba2", "mamba"],
    plant_a_convolution_that_is_shifted: ONE_OF_EACH,
    plant_nodes_that_see_their_siblings: ["qwen3_5", "kimi_linear"],
    plant_tokens_beyond_the_end_of_a_row: ONE_OF_EACH,
}


@pytest.mark.parametrize(
    ("bug", "name"), [(bug, name) for bug in BUGS for name in BUGS[bug]], ids=lambda x: getattr(x, "__name__", x)
)
def test_the_walk_finds_planted_bugs(bug, name, monkeypatch):
    walk = Walk(HYBRIDS[name](), steps=5)
    bug(monkeypatch)
    assert any(difference > WRONG for difference in walk.differences())


PROBED = {  # what the probe finds of a planted bug
    plant_a_state_of_one_token_less: "a token after an accepted one",
    plant_a_convolution_that_is_shifted: "a text that is read in two forward passes",
    plant_nodes_that_see_their_siblings: "a tree in one forward pass",
    plant_tokens_beyond_the_end_of_a_row: "a text beside a longer one",
}


@pytest.mark.parametrize("bug", PROBED, ids=lambda bug: bug.__name__)
def test_the_probe_refuses_a_model_that_some_check_fails_for_and_says_which_and_by_how_much(bug, monkeypatch):
    bug(monkeypatch)
    match = rf"Qwen3_5ForCausalLM cannot be .*: {PROBED[bug]} differs by .*e[-+]0. of the largest logit.*token by token"
    with pytest.raises(UnsupportedModel, match=match):
        specdec.ModelTarget(HYBRIDS["qwen3_5"]())


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_follow_a_tree_are_refused_with_what_was_found(name):
    make, reason = REFUSED[name]
    model = make()
    left, weights = state(model), copy.deepcopy(model.state_dict())
    with pytest.raises(
        UnsupportedModel, match=rf"{type(model).__name__} cannot be decoded speculatively: .*({reason})"
    ):
        specdec.generate(model, PROMPTS)
    with pytest.raises(UnsupportedModel, match=reason):
        ModelDrafter(model)
    assert state(model) == left
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
