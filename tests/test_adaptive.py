"""Adaptive trees: lossless in every state, silent where drafting does not pay, repeatable where times are given."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PROMPTS, llama, reference

import specdec
from specdec import Sampling
from specdec.drafters import Fallback, LayerSkipDrafter, MedusaDrafter, MedusaHeads, ModelDrafter, NgramDrafter
from specdec.rules import LevelVerification, SiblingRejection, TraversalVerification
from specdec.testing import Table, TabularDrafter, TabularTarget, exact_law, target_law
from specdec.theory import CostCurve, Costs
from specdec.trees import Adaptive
from specdec.trees.adaptive import hit_rates as estimates
from specdec.trees.adaptive import policy as adaptive
from specdec.trees.adaptive import price as economy

torch.set_num_threads(1)
STEPS = 400
LOST = (
    estimates._PRIOR * (1 + STEPS * estimates._FORGET) + 1
)  # tokens: the bound of `Rate`, and the first draft's second level


def costs(draft: float, node: float) -> Costs:
    """Times relative to one target forward over one node: of a draft forward, and of one more node."""
    return Costs(CostCurve((1, 24), (1.0, 1.0 + 23 * node)), CostCurve((1, 8), (draft, draft)))


CHEAP, DEAR = costs(0.01, 0.02), costs(0.5, 0.1)


class Watched(Adaptive):
    """Notes how many nodes every tree of a run has."""

    def __post_init__(self):
        super().__post_init__()
        self.runs = []

    def grow(self, context, coins):
        if coins.step == 0:
            self.runs.append([])
        grown = yield from super().grow(context, coins)
        self.runs[-1].append(grown.tree.tokens.shape[1])
        return grown


@pytest.mark.parametrize(
    "rule", [SiblingRejection(), TraversalVerification(), LevelVerification(1)], ids=lambda rule: type(rule).__name__
)
@pytest.mark.parametrize("merge", [True, False], ids=["from_any_text", "whole_runs"])
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=2)], ids=["t1", "top_k"])
def test_sampled_text_is_lossless(sampling, merge, rule):
    target, tree = TabularTarget(2, seed=2), Watched(6, 3, 2, costs=CHEAP)
    options = {"sampling": sampling, "max_new_tokens": 3, "stop_tokens": (1,)}
    law = exact_law(target, (0, 1, 0), TabularDrafter(Table(2, seed=1), tree), rule=rule, merge=merge, **options)
    assert law.total_variation(target_law(target, (0, 1, 0), **options)) == 0
    assert max(map(max, tree.runs)) > 3


def test_text_is_lossless_while_it_stops_drafting_and_tries_again(monkeypatch):
    monkeypatch.setattr(estimates, "_FORGET", 0.5)  # try again after a few steps, not a hundred
    monkeypatch.setattr(adaptive, "_REST", 1)
    target, tree = TabularTarget(2, seed=2), Watched(6, 3, 1, costs=DEAR)
    law = exact_law(target, (0, 1, 0), TabularDrafter(Table(2, seed=1), tree), max_new_tokens=5, merge=False)
    assert law.total_variation(target_law(target, (0, 1, 0), max_new_tokens=5)) == 0
    assert any(sizes[step] == 1 and max(sizes[step:]) > 1 for sizes in tree.runs for step in range(len(sizes)))


DRAFTERS = {
    "model": lambda tree, model: ModelDrafter(llama(1), tree),
    "itself": lambda tree, model: ModelDrafter(model, tree),
    "layer skip": lambda tree, model: LayerSkipDrafter(exit_layer=2, tree=tree),
    "medusa": lambda tree, model: MedusaDrafter(MedusaHeads(3, 1, 32).double(), replace(tree, depth=3)),
    "second": lambda tree, model: Fallback(NgramDrafter(2), ModelDrafter(llama(1), tree)),
    "first": lambda tree, model: Fallback(ModelDrafter(llama(1), tree), NgramDrafter(2)),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("frozen", [CHEAP, DEAR, None], ids=["cheap", "dear", "timed"])
def test_greedy_text_equals_transformers_generate(name, frozen):
    model = llama()
    drafter = DRAFTERS[name](Adaptive(costs=frozen), model)
    out = specdec.generate(model, PROMPTS, drafter, max_new_tokens=24)
    assert [t.tolist() for t in out.tokens] == [reference(model, p).tolist() for p in PROMPTS]


def test_the_contract_is_kept():
    tiny = {"vocab_size": 3, "hidden_size": 16, "head_dim": 4, "eos_token_id": None}
    drafter = ModelDrafter(llama(1, **tiny, num_hidden_layers=1), Adaptive(5, 2, 2, costs=CHEAP))
    law = exact_law(model := llama(0, **tiny, num_hidden_layers=2), (0, 1, 0), drafter)
    assert law.total_variation(target_law(model, (0, 1, 0))) <= 1e-12


@pytest.mark.parametrize("name", ["model", "layer skip"])
def test_a_second_run_repeats_the_first_where_times_are_given(name):
    model = llama()
    drafter = DRAFTERS[name](Adaptive(costs=CHEAP), model)
    options = {"sampling": Sampling(1.0), "seed": 3, "max_new_tokens": 32}
    first, second = (specdec.generate(model, PROMPTS, drafter, **options) for _ in range(2))
    assert all(map(torch.equal, first.tokens, second.tokens))
    assert [s.nodes for s in first.trace.steps] == [s.nodes for s in second.trace.steps]


class Wrong(Table):
    """Uniform, or certain of the token that the target finds least likely."""

    def __init__(self, target: TabularTarget, certain: bool):
        super().__init__(target.vocab)
        self.target, self.certain, self.asked = target, certain, 0

    def logits(self, text):
        self.asked += 1
        likely = self.target.logits(text)
        return torch.where(likely == likely.min(), 30.0 if self.certain else 0.0, 0.0).double()


class Peaked(TabularTarget):
    def logits(self, text):
        return 6 * super().logits(text)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "t1"])
@pytest.mark.parametrize("certain", [False, True], ids=["uniform", "confidently_wrong"])
@pytest.mark.parametrize("given", [costs(0.05, 0.02), costs(0.3, 0.1)], ids=["cheap", "dear"])
def test_a_draft_that_is_never_accepted_costs_a_few_tokens(given, certain, sampling):
    target = Peaked(50, seed=4)
    draft = Wrong(target, certain)
    options = {"sampling": sampling, "max_new_tokens": STEPS, "stop_tokens": ()}
    out = specdec.generate(target, torch.tensor([1, 2]), TabularDrafter(draft, Adaptive(costs=given)), **options)
    seconds = sum(given.verify(step.nodes) for step in out.trace.steps) + given.draft(1) * draft.asked
    assert seconds <= STEPS + LOST  # of one per token without a draft


def test_a_draft_model_that_was_silent_for_long_reads_on_where_it_stood(monkeypatch):
    monkeypatch.setattr(estimates, "_FORGET", 0.03)  # try again after some 20 steps
    model, tree = llama(), Watched(costs=DEAR)
    out = specdec.generate(model, PROMPTS[:1], ModelDrafter(llama(5), tree), max_new_tokens=120, stop_tokens=())
    assert out.tokens[0].tolist() == reference(model, PROMPTS[0], max_new_tokens=120, eos_token_id=-1).tolist()
    drafted = [step for step, size in enumerate(tree.runs[0]) if size > 1]
    assert max(b - a for a, b in itertools.pairwise(drafted)) > 8
    assert drafted[-1] > 40


def test_a_draft_that_is_always_accepted_is_used_to_the_full():
    model = llama()
    out = specdec.generate(
        model, PROMPTS[:1], ModelDrafter(model, Adaptive(costs=CHEAP)), max_new_tokens=96, stop_tokens=()
    )
    assert out.summary()["acceptance_length"] > 5


def test_costs_that_do_not_reach_are_refused():
    with pytest.raises(ValueError, match="measure more"):
        Adaptive(nodes=32, costs=CHEAP)


def drafts(rows: float, left: float, chance: float) -> int:
    """How many children a step gives its root, where a draft of that chance costs 0.1 of a step."""
    books = economy.Economy(
        estimates.Times(2, lambda nodes: 0.95 + 0.05 * nodes), estimates.Times(1, lambda _: 0.05), estimates.Times(1)
    )
    books.begin(1, rows, left)
    return books.children(1.0, [chance])


def test_a_batch_that_ends_with_its_last_row_needs_better_drafts():
    """By 1.42 standard deviations for the last of 8 rows."""
    assert drafts(1, 48, 0.12) == 1 and drafts(8, 48, 0.12) == 0
    assert drafts(8, 48, 0.5) == 1 and drafts(8, 1e4, 0.12) == 1


def test_variance_of_what_is_accepted_is_that_of_the_depth_reached():
    chances = [0.9, 0.5, 0.4]
    accepted = estimates.Accepted()
    for level, chance in enumerate(chances):
        accepted = accepted.and_at(level, chance)
    depths = [a - b for a, b in zip([1.0, *chances], [*chances, 0.0], strict=True)]
    assert accepted.mean == pytest.approx(sum(n * p for n, p in enumerate(depths)))
    assert accepted.square == pytest.approx(sum(n * n * p for n, p in enumerate(depths)))


def test_what_texts_differ_in_is_not_evened_out_by_more_steps():
    drafts = estimates.Accepted(0.5, 0.5)  # one child, accepted half of the time
    alone, last = estimates.Lag.of(1, math.inf), estimates.Lag.of(8, math.inf)
    assert drafts.worth(alone) == 0.5
    assert drafts.worth(last) == pytest.approx(0.5 * (1 - last.last * estimates._UNLIKE))
    assert drafts.worth(estimates.Lag.of(8, 48)) < drafts.worth(last)


@pytest.mark.parametrize(("accepted", "percent"), [(0.13, 5), (0.9, 1)], ids=["hardly_pays", "pays"])
def test_steps_without_a_draft_are_timed_seldom_and_more_often_where_drafts_hardly_pay(monkeypatch, accepted, percent):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(economy.time, "perf_counter", lambda: clock.now)
    books, sizes = economy.Economy(*map(estimates.Times, (2, 1, 1))), []
    for step in range(1000):
        books.begin(1)
        count = 0
        if books.continues():
            clock.now += 0.05
            count = books.children(1.0, [accepted])
        books.finish()
        clock.now += 1.0 + 0.02 * count
        books.learn([(1.0, [accepted, 0.0] if step % 100 < 100 * accepted else [accepted])] if count else [])
        sizes.append(count)
    assert sizes[0] == 0 and sum(sizes[500:]) > 400
    assert percent / 2 <= 100 * sizes[500:].count(0) / 500 <= 2 * percent


@pytest.mark.parametrize("drafter", ["model", "second"])
def test_processes_that_share_a_model_do_not_draft_by_their_own_clocks(drafter):
    model = llama()
    model._tp_size = 2
    with pytest.raises(ValueError, match="2 processes"):
        specdec.generate(model, PROMPTS, DRAFTERS[drafter](Adaptive(), model), max_new_tokens=4)
    specdec.generate(model, PROMPTS, DRAFTERS[drafter](Adaptive(costs=CHEAP), model), max_new_tokens=4)
