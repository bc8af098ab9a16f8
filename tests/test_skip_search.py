"""Searching for layers to skip: acceptance without decoding is that of decoding, and superfluous layers are found."""

from itertools import islice

import pytest
import torch
from hybrid_models import HYBRIDS
from tiny_models import MATRIX, llama

import specdec
from specdec import Sampling
from specdec.drafters import LayerSkipDrafter
from specdec.drafters.layer_skip import decoder_layers, skippable
from specdec.testing import exact_law, target_law
from specdec.testing.drafters import Noting
from specdec.theory import CostCurve
from specdec.training.self_distillation import continuations
from specdec.training.skip_search import LayerCosts, Rehearsal, measure_layer_costs, predict, search
from specdec.trees import Chain

torch.set_num_threads(1)
LAYERS, IDENTITIES, DEPTH = 6, frozenset({1, 2, 4}), 3
COSTS = LayerCosts(CostCurve([1, 8], [6.5, 7.5]), outside=0.5, layer=1.0)
ROUNDING = 1e-12  # of float64 laws: sums in another order


def with_identities(**changes):
    """A Llama in which some layers add nothing to the residual stream."""
    model = llama(num_hidden_layers=LAYERS, eos_token_id=None, **changes)
    for i in IDENTITIES:
        for projection in (model.model.layers[i].self_attn.o_proj, model.model.layers[i].mlp.down_proj):
            projection.weight.data.zero_()
    return model


def own_texts(model, sampling, count=24, tokens=12):
    prompts = [torch.tensor([3 + i, 40 - i, 5]) for i in range(count)]
    return next(continuations(model, prompts, new_tokens=tokens, sampling=sampling))


def trials(model, sampling, least=1, known=None):
    rehearsal, known = Rehearsal(model, own_texts(model, sampling), DEPTH, sampling), {} if known is None else known

    def trial(skip):
        if skip not in known:
            known[skip] = rehearsal.reach(skip)
        return predict(skip, known[skip], COSTS.keeping(LAYERS - len(skip)))

    return search(trial, range(LAYERS), least, LAYERS - 1)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.2)], ids=["greedy", "sampled"])
def test_layers_that_do_nothing_are_found_and_no_others(sampling):
    tried = list(trials(with_identities(), sampling))
    best = max(tried, key=lambda t: t.speed_up)
    assert best.skip == IDENTITIES
    assert best.reach == pytest.approx([1.0] * DEPTH, abs=ROUNDING)
    assert best.length == DEPTH
    assert len({t.skip for t in tried}) == len(tried) < 2**LAYERS - 1  # fewer than there are


def test_a_tighter_budget_costs_acceptance():
    sampling = Sampling(1.0)
    tried = [t for t in trials(with_identities(), sampling, least=4) if len(t.skip) >= 4]
    best = max(tried, key=lambda t: t.speed_up)
    assert len(best.skip) >= 4
    assert best.reach[0] < 1


def test_places_of_texts_of_several_lengths_are_read_from_clean_memory(monkeypatch):
    """Slots that a row has not written are as the memory was found: NaN, if it comes to the worst."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kinds: empty(*size, **kinds).fill_(float("nan")))
    model, sampling = llama(eos_token_id=None), Sampling()
    texts = [text[: len(text) - cut] for cut, text in enumerate(own_texts(model, sampling, 3))]
    assert Rehearsal(model, texts, DEPTH, sampling).reach(frozenset()) == [1.0] * DEPTH


def test_what_texts_share_is_read_once_and_nothing_else_changes():
    model, sampling = llama(eos_token_id=None), Sampling(1.0)
    first, second = own_texts(model, sampling, 2, tokens=117)
    texts = [first[: 60 + DEPTH + 1], second, first, first[: 60 + DEPTH + 1], second[: 100 + DEPTH + 1]]
    together, skip = Rehearsal(model, texts, DEPTH, sampling), frozenset({1})
    apart = [Rehearsal(model, [text], DEPTH, sampling).reach(skip) for text in texts]
    assert together.reach(skip) == pytest.approx(
        torch.tensor(apart, dtype=torch.float64).mean(0).tolist(), abs=ROUNDING
    )
    assert together._cached.tokens_read == len(first) + len(second) - 2 * (DEPTH + 1)  # not 552


def test_greedy_reach_is_that_of_decoding():
    """Every place of a greedy text is tried, so that the mean acceptance of chains of one is known without error."""
    model, sampling, prompt = llama(num_hidden_layers=3, eos_token_id=None), Sampling(), torch.tensor([3, 4, 5])
    text = torch.cat([prompt, specdec.generate(model, prompt, max_new_tokens=24).tokens[0]])
    noting = Noting(LayerSkipDrafter(skip=[1], tree=Chain(1)))
    specdec.generate(model, prompt, noting, max_new_tokens=24)
    drafted = [(len(draft.text), draft.tokens[1]) for draft in noting.drafts if len(draft.tokens) > 1]
    matches = [(at, token == int(text[at])) for at, token in drafted]
    rows = [Rehearsal(model, [text[: at + 1]], 1, sampling).reach(frozenset({1})) for at, _ in matches]
    assert rows == [[float(match)] for _, match in matches]
    assert 0 < sum(match for _, match in matches) < len(matches)


def test_sampled_reach_is_the_expected_acceptance_of_the_loop():
    model = llama(vocab_size=4, hidden_size=16, head_dim=4, num_hidden_layers=2, eos_token_id=None)
    drafter, sampling, prompt, depth = LayerSkipDrafter(exit_layer=1, tree=Chain(2)), Sampling(1.0), (0, 1, 0), 2
    options = {"sampling": sampling, "stop_tokens": ()}
    law = exact_law(model, prompt, drafter, max_new_tokens=depth + 1, **options)
    texts = target_law(model, prompt, max_new_tokens=depth, **options)
    rows = {text: Rehearsal(model, [torch.tensor((*prompt, *text))], depth, sampling) for text in texts}
    expected = 1 + sum(float(p) * sum(rows[text].reach(frozenset({1}))) for text, p in texts.items())
    assert expected == pytest.approx(float(law.expected_tokens), abs=ROUNDING)


def test_texts_too_short_for_the_chains_are_refused():
    with pytest.raises(ValueError, match="has 4 tokens: chains of 3 need 5"):
        Rehearsal(llama(), [torch.arange(4)], DEPTH, Sampling())


def test_layers_are_left_out_one_by_one_before_early_exits():
    first = [t.skip for t in islice(trials(with_identities(), Sampling()), LAYERS)]
    assert sorted(map(sorted, first)) == [[layer] for layer in range(LAYERS)]


@pytest.mark.parametrize("name", ["gemma3n_shared_layers", "gpt_neox"])
def test_other_models_can_be_searched(name):
    model = MATRIX[name]()
    count, free = len(decoder_layers(model)), skippable(model)
    costs = measure_layer_costs(model, nodes=2, context=8, repeats=3)
    assert costs.draft(count) == pytest.approx(costs.verify(1))
    rehearsal = Rehearsal(model, own_texts(model, Sampling(1.0), count=2), 1, Sampling(1.0))
    reach = {i: rehearsal.reach(frozenset({i})) for i in free}
    assert all(0 < r[0] <= 1 for r in reach.values())


def test_layers_that_return_more_than_a_tensor_are_left_out_too():
    model = HYBRIDS["falcon_h1"]()
    rehearsal = Rehearsal(model, own_texts(model, Sampling(1.0), count=4), 2, Sampling(1.0))
    assert rehearsal.reach(frozenset()) == pytest.approx([1.0] * 2, abs=1e-5)  # float32
    assert all(0 < chance < 0.999 for chance in rehearsal.reach(frozenset({0})))
