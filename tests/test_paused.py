"""`Paused`: lossless whatever it decides, silent where drafts do not pay, at a bounded loss, and repeatable at given times."""

import numpy as np
import pytest
import torch
from tiny_models import PROMPTS, llama, reference

import specdec
from specdec import Law, Sampling
from specdec.drafters import (
    Fallback,
    LayerSkipDrafter,
    MedusaDrafter,
    MedusaHeads,
    ModelDrafter,
    NgramDrafter,
    Paused,
    Point,
    PointRun,
    SuffixDrafter,
)
from specdec.drafters.balance import Balance
from specdec.rules import LevelVerification, SiblingRejection, TraversalVerification
from specdec.testing import Table, TabularDrafter, TabularTarget, Tape, exact_law, target_law
from specdec.theory import CostCurve
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
CHEAP = CostCurve((1, 17), (1.0, 1.2))
DEAR = CostCurve((1, 2, 17), (1.0, 1.3, 33.0))  # but for a single drafted node
RULES = [SiblingRejection(), TraversalVerification(), LevelVerification(1)]


class Watched(Paused):
    """Notes how many nodes every tree of a run has."""

    runs = ()

    def start(self, target, batch, last=None):
        run, sizes = super().start(target, batch), []
        propose = run.propose

        def noted(coins):
            tree = propose(coins)
            sizes.append(tree.tokens.shape[1])
            return tree

        run.propose, self.runs = noted, (*self.runs, sizes)
        return run


def drafted(out):
    """Whether each step had a draft."""
    return [step.nodes > 1 for step in out.trace.steps]


@pytest.mark.parametrize("merge", [True, False], ids=["from_any_text", "whole_runs"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=2)], ids=["t1", "top_k"])
def test_sampled_text_is_lossless_while_drafts_are_paused_and_tried_again(sampling, rule, merge):
    target, inner = TabularTarget(2, seed=2), TabularDrafter(Table(2, seed=1), Widths((2,), Law.IID))
    drafter = Watched(inner, 0.5, 0.6, seconds=CostCurve((1, 3), (1.0, 1.5)))
    options = {"sampling": sampling, "max_new_tokens": 4, "stop_tokens": (1,)}
    law = exact_law(target, (0, 1, 0), drafter, rule=rule, merge=merge, **options)
    assert law.total_variation(target_law(target, (0, 1, 0), **options)) == 0
    patterns = {tuple(size > 1 for size in sizes[:3]) for sizes in drafter.runs}
    # the second step drafts if the first draft was accepted, the third tries again
    assert merge or {(True, False, True), (True, True)} <= {pattern[:n] for pattern in patterns for n in (2, 3)}


@pytest.mark.parametrize("merge", [True, False], ids=["from_any_text", "whole_runs"])
def test_sampled_text_is_lossless_with_drafts_from_the_text_itself(merge):
    target, drafter = (
        TabularTarget(2, seed=2),
        Watched(NgramDrafter(2), 0.2, 0.1, seconds=CostCurve((1, 3), (1.0, 1.3))),
    )
    law = exact_law(target, (0, 1, 0), drafter, max_new_tokens=4, merge=merge)
    assert law.total_variation(target_law(target, (0, 1, 0), max_new_tokens=4)) == 0
    assert merge or len({tuple(size > 1 for size in sizes) for sizes in drafter.runs}) > 1


DRAFTERS = {
    "model": lambda model: ModelDrafter(llama(1), Chain(3)),
    "itself": lambda model: ModelDrafter(model, Chain(3)),
    "layer skip": lambda model: LayerSkipDrafter(exit_layer=2, tree=Chain(3)),
    "medusa": lambda model: MedusaDrafter(MedusaHeads(3, 1, 32).double()),
    "n-grams": lambda model: NgramDrafter(4),
    "fallback": lambda model: Fallback(SuffixDrafter(), ModelDrafter(llama(1), Chain(3))),
}
PLACES = {
    "alone": Paused,
    "first": lambda *args, **options: Fallback(Paused(*args, **options), NgramDrafter(2)),
    "second": lambda *args, **options: Fallback(NgramDrafter(2), Paused(*args, **options)),
}


@pytest.mark.parametrize(
    ("place", "seconds"), [("alone", CHEAP), ("alone", None), *((place, DEAR) for place in PLACES)]
)
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_equals_transformers_generate(name, place, seconds):
    model = llama()
    drafter = PLACES[place](DRAFTERS[name](model), 0.5, 0.3, seconds=seconds)
    out = specdec.generate(model, PROMPTS, drafter, max_new_tokens=24)
    assert [t.tolist() for t in out.tokens] == [reference(model, p).tolist() for p in PROMPTS]


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.filterwarnings("ignore:engine")
def test_captured_stages_give_the_same_text_and_later_runs_capture_nothing_more(name):
    model = llama(dtype=torch.float32)
    drafter = Paused(DRAFTERS[name](model), 0.5, 0.3, seconds=DEAR)
    engine, options = specdec.Graphs(capture=Tape), {"max_new_tokens": 24, "stop_tokens": ()}
    expected = specdec.generate(model, PROMPTS, drafter, **options)
    runs, counts = [], []
    for _ in range(4):  # a stage is captured when it is met for the third time
        runs.append(specdec.generate(model, PROMPTS, drafter, engine=engine, **options))
        counts.append(engine.captured)
    assert 0 < counts[-2] == counts[-1]
    for run in runs:
        assert all(map(torch.equal, run.tokens, expected.tokens))
        assert drafted(run) == drafted(expected)  # and begins with the balance of a first run
    assert len({*drafted(expected)}) == 2


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_seed_repeats_a_run_and_its_pauses_where_times_are_given(name):
    model = llama()
    drafter = Paused(DRAFTERS[name](model), 0.5, 0.3, seconds=DEAR)
    options = {"sampling": Sampling(1.0), "seed": 3, "max_new_tokens": 32}
    first, second = (specdec.generate(model, PROMPTS, drafter, **options) for _ in range(2))
    assert all(map(torch.equal, first.tokens, second.tokens))
    assert drafted(first) == drafted(second)


def test_a_draft_model_that_was_paused_reads_what_it_missed_and_drafts_as_if_it_never_had_been():
    model = llama()
    drafter = Paused(ModelDrafter(model, Chain(3)), 0.5, 0.1, seconds=DEAR)  # right, and too dear
    out = specdec.generate(model, PROMPTS[:1], drafter, max_new_tokens=60, stop_tokens=())
    steps = [step for step in out.trace.steps if step.nodes > 1]
    assert 1 < len(steps) < 10
    assert all(step.accepted == [step.nodes - 1] for step in steps)


@pytest.mark.parametrize("timed", [True, False], ids=["timed", "given"])
@pytest.mark.parametrize("cost", [1.2, 3.0, 8.0])
def test_drafts_that_are_never_accepted_lose_no_more_than_the_bound(cost, timed):
    balance = Balance(3.0, 0.02, None if timed else CostCurve((1, 5), (1.0, cost)))
    lost, steps = 0.0, 2000
    for _ in range(steps):
        drafts = balance.drafts
        balance.see(5 if drafts else 0, 1, cost if drafts else 1.0)
        lost += (cost - 1) * drafts
    assert 0.9 * 0.02 * steps < lost <= 3.0 + 0.02 * steps + (1 + timed) * (cost - 1)  # two to begin with, if timed


def test_drafts_that_pay_are_made_in_all_steps_but_those_that_time_a_step_without():
    balance, made = Balance(3.0, 0.02), []
    for _ in range(500):
        made.append(balance.drafts)
        balance.see(3 if made[-1] else 0, 2, 1.2 if made[-1] else 1.0)
    assert [i for i, drafts in enumerate(made) if not drafts] == list(range(0, 500, 51))


def test_drafts_that_come_to_pay_after_a_long_pause_are_found_within_as_many_steps_as_one_attempt_costs():
    balance, made = Balance(3.0, 0.02, CostCurve((1, 3), (1.0, 1.4))), []
    for step in range(1000):
        made.append(balance.drafts)
        balance.see(3 if made[-1] else 0, 3 if step >= 500 else 1, 0.0)
    assert sum(made[100:500]) < 0.06 * 400
    assert all(made[500 + round(0.4 / 0.02) + 1 :])


def test_one_interrupted_step_pauses_nothing():
    balance = Balance(3.0, 0.02)
    for step in range(200):
        drafts = balance.drafts
        assert drafts or step % 51 == 0
        balance.see(3 if drafts else 0, 2, (100.0 if step in (1, 30, 77, 120) else 1.2) if drafts else 1.0)


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("slope", [0.01, 0.25, 1.0])
def test_points_that_always_promise_all_and_are_never_accepted_lose_at_most_3_percent_of_64_steps(rows, slope):
    balance, promised = Balance(1.0, 0.01, rows=rows), np.arange(1.0, 17.0)
    lost, drafted, steps = 0.0, [], 64
    for _ in range(steps):
        nodes = balance.affords(promised) if balance.drafts else 0
        drafted += [nodes] if nodes else []
        lost += slope * nodes
        balance.see(nodes + 1 if nodes else 0, 1, 1 + slope * nodes)
    # twice a size is drafted before its time is known; 8 tokens for half a step are what is foreseen
    unforeseen = max(slope - 0.5 / max(8 // rows, 1), 0.0) * (drafted[0] if drafted else 0)
    assert lost <= 1.0 + 0.01 * steps + 2 * unforeseen
    assert unforeseen or lost < 0.03 * steps


def test_no_more_is_risked_than_is_left_and_of_that_what_gains_most():
    balance = Balance(1.0, 0.01, CostCurve((1, 17), (1.0, 9.0)))  # half a step a node
    assert balance.affords(np.array([0.4, 0.8, 1.2])) == 0
    assert balance.affords(np.array([0.6, 1.3, 1.4, 3.0])) == 2  # 4 nodes would gain 1, but lose 2 if they fail
    balance.see(3, 3, 0.0)  # 2 of 2 accepted: 1 step gained
    assert balance.left == 2.0
    assert balance.affords(np.array([0.6, 1.3, 1.4, 3.0])) == 4


def test_sizes_that_were_not_measured_are_foreseen_from_those_that_were():
    balance = Balance(1.0, 0.01, rows=4)
    assert [balance.loss(nodes) for nodes in (2, 3, 5)] == [0.5, 0.5, 1.0]  # 8 further tokens take half a step
    balance.see(0, 1, 2.0)
    for _ in range(2):
        balance.see(5, 1, 2.8)
    assert [balance.loss(nodes) for nodes in (2, 5, 9)] == pytest.approx([0.4, 0.4, 0.8])


class Doubtful(NgramDrafter):
    """Says of one token of the text that it is likely to come next, and of another that it is not."""

    def start(self, target, batch, last=None):
        return DoubtfulRun(self, batch)


class DoubtfulRun(PointRun):
    def points(self):
        return [[Point(2, 0, 0.9), Point(1, 0, 0.3)] for _ in self.batch.texts] if self.batch.max_depth else [[]]


def test_only_points_that_are_worth_their_time_are_drafted():
    sizes = []
    for node in (0.05, 0.2, 0.9):
        drafter = Paused(Doubtful(), seconds=CostCurve((1, 3), (1.0, 1.0 + 2 * node)))
        out = specdec.generate(TabularTarget(4), [torch.tensor([1, 2])], drafter, max_new_tokens=2, stop_tokens=())
        sizes.append(out.trace.steps[0].nodes)
    assert sizes == [3, 2, 1]


class RightInOneRow(Table):
    """The table itself for texts that begin with 0, and its opposite for others."""

    def logits(self, text):
        return super().logits(text) * (1 if text[0] == 0 else -1)


@pytest.mark.parametrize(("draft", "pays"), [(Table, True), (RightInOneRow, False)])
def test_a_batch_is_judged_by_the_row_that_has_most_to_come(draft, pays):
    table, prompts = TabularTarget(24, seed=3), [torch.tensor([i, 1]) for i in range(4)]
    drafter = Paused(TabularDrafter(draft(24, seed=3), Chain(2)), 0.3, 0.1, seconds=CostCurve((1, 3), (1.0, 1.4)))
    out = specdec.generate(table, prompts, drafter, max_new_tokens=30, stop_tokens=())
    assert all(drafted(out)[:-1]) if pays else sum(drafted(out)) < 8


def test_rows_that_have_ended_do_not_count_as_rows_that_accepted_nothing():
    table, prompts = TabularTarget(24, seed=3), [torch.tensor([i, 1]) for i in range(4)]
    inner = TabularDrafter(Table(24, seed=3), Chain(2))  # always right
    drafter = Paused(inner, 0.3, 0.1, seconds=CostCurve((1, 3), (1.0, 2.5)))
    out = specdec.generate(table, prompts, drafter, max_new_tokens=30, stop_tokens=(0,))
    assert min(map(len, out.tokens)) < max(map(len, out.tokens)) - 6
    assert all(drafted(out)[:-1])


def test_processes_that_share_a_model_do_not_pause_by_their_own_clocks():
    model = llama()
    model._tp_size = 2
    inner = ModelDrafter(llama(1), Chain(2))
    for drafter in (Paused(inner), Fallback(NgramDrafter(2), Paused(inner))):
        with pytest.raises(ValueError, match=r"2 processes.*Paused\(drafter, seconds=...\)"):
            specdec.generate(model, PROMPTS, drafter, max_new_tokens=4)
    specdec.generate(model, PROMPTS, Paused(inner, seconds=CHEAP), max_new_tokens=4)
