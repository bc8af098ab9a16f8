"""Plans: what is foretold is what runs would give at these prices, and what is said of it follows from the numbers."""

import warnings
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from tiny_models import llama

import specdec
from specdec import Law, Sampling, generate
from specdec.clock import Clock, told_by
from specdec.drafters import (
    Fallback,
    LayerSkipDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
    Paused,
    SuffixDrafter,
)
from specdec.engines.base import Engine
from specdec.models.cached_model import CachedModel
from specdec.prediction import read_along, replay
from specdec.prediction.replay import Recorded
from specdec.rules import BlockVerification, SiblingRejection, TraversalVerification
from specdec.theory import predicted_speed_up
from specdec.trace import Step, Trace
from specdec.trees import Chain, Static, Widths
from specdec.tuning import Estimate, Plan, Row, Speedup, layers, roofline
from specdec.tuning.budget import Budget
from specdec.tuning.checking import Check, over_all, spent
from specdec.tuning.conditions import Conditions, afresh, rules
from specdec.tuning.estimate import DRAWS
from specdec.tuning.foretold import LEAST, Candidate, Foretold, of_replays, of_tree, replayed
from specdec.tuning.measuring import measured
from specdec.tuning.offers import Offer, given
from specdec.tuning.prices import Prices, Sample, Work, work
from specdec.tuning.probes import InTurn, Probe, Stars, probes
from specdec.tuning.reasons import reason, verdict
from specdec.tuning.search import finalists, suited, tree_of
from specdec.tuning.shapes import depths, positional, proposed
from specdec.tuning.tune import groups
from specdec.tuning.writing import write

torch.set_num_threads(1)
EXACT = 1e-9  # sums of float64
PROMPTS = [torch.tensor([3, 4, 3, 4, 3]), torch.tensor([7, 8, 9, 7, 8, 9])]
SHAPES = [Widths((1, 1)), Widths((1,) * 5), Widths((3, 3)), Widths((3, 3, 2))]
GREEDY = Sampling()


def prices(once=0.02, level=0.3, asked=0.01, node=0.1, loop=0.02):
    """Of a machine on which these are the costs, in steps without a draft, of which the loop is a tenth."""
    plain = [Sample(n, 0.0, 0.9 + node * (n - 1), 0.1 + loop * (n - 1)) for n in (1, 2, 4, 8, 16, 32)] * 3
    drafted = {}
    for tree in SHAPES:
        made, n = work(tree.parents), len(tree.parents)
        one = Sample(n, once + level * made.levels + asked * made.asked, 0.9 + node * (n - 1), 0.1 + 2 * loop * (n - 1))
        drafted["draft", "SiblingRejection", made] = [one] * 3
    return Prices(plain, drafted, [0.5, 0.5])


def conditions(target, sampling=GREEDY, batch=1):
    return Conditions(specdec.ModelTarget(target), sampling, batch, Engine, 16)


def test_lines_through_measured_steps_tell_the_price_of_other_trees():
    parents = [-1, 0, 0, 1, 1, 3]  # 3 levels with children, of 1, 1 and 1 nodes
    step = prices().step("draft", "SiblingRejection", parents)
    whole = 0.02 + 0.3 * 3 + 0.01 * 3 + 0.9 + 0.1 * 5 + 0.1 + 0.04 * 5
    assert work(parents) == Work(3, 3)
    assert step == pytest.approx(np.full(1 + DRAWS, whole), rel=EXACT)
    assert prices().costs("draft", "SiblingRejection", 32).step(parents) == pytest.approx(whole, rel=EXACT)


def test_a_greedy_tree_is_foretold_as_its_run_at_these_prices():
    target, draft = llama(0, eos_token_id=None), llama(0, eos_token_id=None)
    with torch.no_grad():
        draft.lm_head.weight.mul_(1 + 0.5 * torch.rand(draft.lm_head.weight.shape, generator=torch.manual_seed(0)))
    tree, found = Static([-1, 0, 0, 1], Law.SAMPLED_THEN_TOP), prices()
    drafter = ModelDrafter(draft, tree)
    texts, traces = [], []
    for prompt in PROMPTS:
        new = generate(target, prompt, max_new_tokens=24).tokens[0]
        texts.append([read_along(target, drafter, torch.cat([prompt, new]), len(prompt), GREEDY)])
        traces.append(generate(target, prompt, drafter, max_new_tokens=24).trace)
    told = of_tree(Candidate("draft", drafter, SiblingRejection()), texts, found)
    length = 48 / sum(len(trace.steps) for trace in traces)
    assert told.acceptance.value == pytest.approx(length, rel=EXACT)
    assert told.speedup.value == pytest.approx(length / float(found.step("draft", "SiblingRejection", tree.parents)[0]))
    assert told.speedup.low < told.speedup.value < told.speedup.high


@pytest.mark.parametrize("drafter", [SuffixDrafter(), Paused(SuffixDrafter())], ids=["suffix", "paused"])
def test_drafts_from_the_text_are_foretold_by_their_replay(drafter):
    target, found = llama(0, eos_token_id=None), prices()
    written = generate(target, PROMPTS, max_new_tokens=48).tokens
    pairs = [([prompt], [new]) for prompt, new in zip(PROMPTS, written, strict=True)]
    traces = replayed(drafter, pairs, 97, GREEDY, found, lambda: False)
    idle = _timed(replay(*pairs[0], Stars([1]), 97), draft=0.01, other=0.02)
    told = of_replays([_timed(trace, draft=0.06, other=0.12) for trace in traces], idle, [0, 1], found)
    steps = [step for trace in traces for step in trace.steps]
    # a step without a draft takes half a second
    parts = 0.05 / 0.5, 0.9 + 0.1 * np.mean([step.nodes - 1 for step in steps]), 0.1 + 0.1 / 0.5
    assert (told.draft, told.verify, told.other) == pytest.approx(parts, rel=EXACT)
    assert told.speedup.value == pytest.approx(96 / len(steps) / sum(parts), rel=EXACT)


def test_texts_of_equal_prompts_are_replayed_as_they_were_written():
    prompt, one, other = PROMPTS[0], torch.tensor([3, 4, 3, 4, 3, 4, 3, 4]), torch.tensor([9, 8, 7, 6, 5, 2, 1, 0])
    alone = replay([prompt], [one], NgramDrafter(), 97)
    beside = replay([prompt, prompt], [one, other], NgramDrafter(), 97)
    assert (
        [step.emitted[0] for step in beside.steps if step.emitted[0]]
        == [step.emitted[0] for step in alone.steps]
        != [1] * 8
    )
    assert [step.emitted[1] for step in beside.steps] == [1] * 8


def test_one_text_does_not_speak_for_a_drafter_even_if_time_is_over():
    pairs = [([PROMPTS[0]], [torch.tensor([3, 4, 3, 4])])] * (LEAST + 2)
    assert len(replayed(NgramDrafter(), pairs, 97, GREEDY, prices(), lambda: True)) == LEAST


def test_captured_steps_cost_what_their_largest_tree_costs():
    target, found, drafter = llama(0, eos_token_id=None), prices(), NgramDrafter()
    written = generate(target, PROMPTS[0], max_new_tokens=24).tokens[0]
    traces = replayed(drafter, [([PROMPTS[0]], [written])], 97, GREEDY, found, lambda: False)
    slow = [_timed(traces[0], draft=0.0, other=0.3)]  # as it stands, not as it was captured
    told = of_replays(slow, _timed(traces[0], 0.0, 0.0), [0], found, padded=9)
    assert told.speedup.value == pytest.approx(24 / len(traces[0].steps) / (1 + 0.12 * 8), rel=EXACT)


def _timed(trace, draft, other):
    return Trace(steps=[replace(step, draft_seconds=draft, other_seconds=other) for step in trace.steps])


def test_shapes_that_are_proposed_begin_with_the_fastest():
    target, draft = llama(0, eos_token_id=None), llama(1)
    new = generate(target, PROMPTS[0], max_new_tokens=24).tokens[0]
    text = read_along(target, ModelDrafter(draft), torch.cat([PROMPTS[0], new]), 5, GREEDY)
    ranks = (text.draft.argsort(-1, descending=True) == new[:, None]).int().argmax(-1)
    acceptance = positional([text], 3, Law.SAMPLED_THEN_TOP)
    assert acceptance[0] == pytest.approx([float((ranks == slot).float().mean()) for slot in range(4)])
    costs = prices(level=0.01, node=0.001, loop=0.001).costs("draft", "SiblingRejection", 32)
    made = proposed([[0.5, 0.2, 0.1], [0.4, 0.1, 0.0]], costs)
    assert made[0] == tuple(specdec.theory.best_tree([[0.5, 0.2, 0.1], [0.4, 0.1, 0.0]], costs))
    assert (-1, 0) in made and (-1, 0, 1) in made and len(set(made)) == len(made)


def test_rules_are_those_that_a_shape_is_for():
    every = [SiblingRejection(), BlockVerification(), TraversalVerification()]
    assert [type(rule) for rule in suited([-1, 0, 1], every)] == [SiblingRejection, BlockVerification]
    assert [type(rule) for rule in suited([-1, 0, 0], every)] == [SiblingRejection, TraversalVerification]
    assert tree_of((-1, 0, 1)) == Chain(2) and tree_of((-1, 0, 0)) == Static([-1, 0, 0], Law.SAMPLED_THEN_TOP)


def test_probes_change_the_size_of_their_trees_from_step_to_step():
    target = llama(0, eos_token_id=None)
    out = generate(target, PROMPTS[0], Stars((1, 4, 2)), max_new_tokens=30)
    assert [step.nodes for step in out.trace.steps[:6]] == [1, 4, 2, 1, 4, 2]
    drafter = ModelDrafter(llama(1), InTurn([Chain(1), Widths((2, 2))]))
    out = generate(target, PROMPTS[0], drafter, sampling=Sampling(1.0), max_new_tokens=30)
    assert [step.nodes for step in out.trace.steps[:4]] == [2, 7, 2, 7]


def test_prices_are_those_of_a_clock_that_ticks_once_a_mark():
    """Each mark is a tick after the one before: drafting takes 2 of the 5 of a step, the pass 1, the loop 2."""
    target, ticks = llama(0, eos_token_id=None), count()
    held = conditions(target)
    made = probes([Offer("draft", ModelDrafter(llama(1)))], held)
    with told_by(lambda: float(next(ticks))):
        *_, found = measured(made, groups(PROMPTS, 1), held, lambda: False, lambda what: None)
    assert found.alone == [5.0, 5.0] and found.knows("draft") and not found.knows("other")
    assert {sample.nodes for sample in found.plain} == {1, 2, 4, 8, 16, 32}
    assert float(found.verify(5)[0]) == pytest.approx(0.2) and float(found.plain_step(1)[0]) == pytest.approx(0.6)


def test_texts_that_time_cuts_have_sixteen_tokens():
    held, found = Conditions(specdec.ModelTarget(llama(0, eos_token_id=None)), GREEDY, 1, Engine, 24), []
    write(found, PROMPTS, held, lambda: True, lambda what: None)
    assert [len(text.new) for text in found] == [16, 16]


def test_the_target_reads_prompts_once_a_round(monkeypatch):
    held, read, counts = conditions(llama(0)), CachedModel.read, []

    def noting(self, *args):
        before = self.tokens_read
        read(self, *args)
        counts.append(self.tokens_read - before)

    monkeypatch.setattr(CachedModel, "read", noting)
    [*measured(probes([], held), [PROMPTS[:1]] * 2, held, lambda: False, lambda what: None)]
    assert sum(counts) == 2 * (len(PROMPTS[0]) - 1)


def test_a_clock_can_be_told_by_another_function():
    ticks = iter([1.0, 4.0, 5.0])
    with told_by(lambda: next(ticks)):
        clock = Clock(torch.device("cpu"))
        clock.mark()
        clock.mark()
    assert clock.seconds() == [3.0, 1.0]
    assert Clock(torch.device("cpu"))._marks[0] > 5


def test_a_budget_ends_its_parts_by_their_shares():
    now = [0.0]
    with Budget(10, now=lambda: now[0]) as budget:
        half, whole = budget.until(0.5), budget.until(1.0)
        now[0] = 4.9
        assert not half() and not whole()
        now[0] = 5.0
        assert half() and not whole() and budget.spent == 5.0
        now[0] = 10.0
        assert whole()


def test_the_steps_of_a_row_take_as_long_as_those_in_which_all_rows_were_at_work():
    steps = [
        Step(2, [0, 1], [2, 1], [1, 0], [1, 1], 9.0, 1.0, 1.0, 1.0),
        Step(2, [0, 1], [1, 1], [0, 0], [1, 1], 0.0, 1.0, 2.0, 2.0),
        Step(2, [0, 1], [1, 0], [0, 0], [1, 0], 0.0, 0.5, 0.5, 0.0),
    ]
    assert spent(Trace(steps=steps)) == [(4, 12.0), (2, 8.0)]


def test_measured_speedups_are_of_the_time_that_all_prompts_take():
    pairs = [[(2.0, 1.0), (2.0, 1.0)], [(6.0, 7.0), (6.0, 7.0)]]
    assert over_all(pairs).value == 1.0
    found = over_all([[(2.0, 1.0)] * 3] * 3)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    assert over_all([[(2.0, 1.0)] * 9]).low is None  # a prompt that is decoded again is no other one


def test_a_long_text_counts_as_much_as_it_is_long():
    class Ending(Recorded):
        stop_tokens = 1

    texts = [torch.tensor([*prompt, *new]) for prompt, new in zip(PROMPTS, ([8, 9] * 10 + [1], [5, 1]), strict=True)]
    held, ticks = Conditions(Ending(texts, 97), GREEDY, 2, Engine, 40), count()
    check = Check([Candidate("ngram", NgramDrafter(), SiblingRejection())], held)
    with told_by(lambda: float(next(ticks))):
        check.run([PROMPTS], lambda: check.rounds == 1, lambda what: None)
    steps = [
        len(generate(Ending([text], 97), p, NgramDrafter()).trace.steps) for text, p in zip(texts, PROMPTS, strict=True)
    ]
    assert check.speedups()[0].value == pytest.approx(23 / sum(steps)) and 2 * sum(steps) < 23


def test_few_prompts_make_intervals_wider():
    """Student's law: of 2 samples 9.2 times as wide as if the normal law held, of 200 hardly wider."""
    draws = np.concatenate([[1.0], np.exp(np.linspace(-0.1, 0.1, DRAWS))])
    few, many = (Estimate.of_draws(draws, samples) for samples in (2, 200))
    assert np.log(few.high) == pytest.approx(9.17 * 0.095, rel=0.03) and np.log(many.high) == pytest.approx(
        0.0965, rel=0.01
    )


def test_candidates_take_turns_with_decoding_alone_and_are_compared_with_it():
    target, ticks = llama(0, eos_token_id=None), count()
    check = Check([Candidate("draft", ModelDrafter(target, Chain(3)), SiblingRejection())], conditions(target))
    left = iter([False] * 200)
    with told_by(lambda: float(next(ticks))):
        check.run([PROMPTS[:1]], lambda: next(left, True), lambda what: None)
    assert check.rounds > 1
    assert check.speedups()[0].value == pytest.approx(4.0)  # 16 tokens in 4 steps, each of the same ticks
    assert check.noise.value == pytest.approx(1.0)


def row(name="draft", predicted=None, measured=None, acceptance=2.0, draft=0.5, verify=1.2, other=0.1, batch_rule=None):
    told = Foretold(Estimate(acceptance, acceptance, acceptance), draft, verify, other, predicted or Estimate(1.0), 1)
    return Row(Candidate(name, NgramDrafter(), SiblingRejection()), told, measured=measured)


def test_verdicts_follow_from_intervals_and_noise():
    noise = Estimate(1.0, 0.95, 1.06)
    sure = {"pays": (1.2, 1.15, 1.25), "does not pay": (0.8, 0.78, 0.82), "cannot tell": (1.05, 0.9, 1.2)}
    for told, numbers in sure.items():
        assert verdict(row(measured=Estimate(*numbers)), noise) == told
    assert verdict(row(measured=Estimate(1.03, 1.02, 1.04)), None) == "pays"
    assert verdict(row(measured=Estimate(1.03, 1.02, 1.04)), noise) == "cannot tell"  # the machine's noise is as large
    assert verdict(row(measured=Estimate(2.0)), noise) == "cannot tell"  # measured once


def test_both_kinds_of_knowledge_count_by_how_sure_they_are():
    both = Speedup(Estimate(1.0, 0.99, 1.01), Estimate(2.0, 1.0, 4.0)).estimate
    assert both.value == pytest.approx(1.01, abs=0.01)
    assert Speedup(None, Estimate(1.5)).estimate == Estimate(1.5)
    assert Speedup(Estimate(1.2, 1.1, 1.3), Estimate(1.5)).estimate.value == pytest.approx(1.2)
    same = Estimate(1.1, 0.99, 1.22)
    assert vars(Speedup(same, same).estimate) == pytest.approx(vars(same))  # of the same prompts: no surer than one
    assert "together 1.10 (0.99-1.22)" in str(Speedup(same, same))


def test_reasons_name_the_number_that_would_have_to_change_and_by_how_much():
    slow = row(predicted=Estimate(0.8, 0.7, 0.9), acceptance=1.5, draft=0.6, verify=1.2, other=0.1)
    said = reason(slow, "does not pay", None, 1)
    assert "drafting takes 0.60 of a step and must take less than 0.20 (3.0 times as fast)" in said
    assert "1.90 tokens would be needed, 1.27 times as many" in said
    large = row(predicted=Estimate(0.6, 0.5, 0.7), acceptance=1.5, draft=0.1, verify=2.2, other=0.2)
    said = reason(large, "does not pay", None, 8)
    assert "batch of 8 is too large: the target's pass over the drafts takes 2.20" in said and "less than 1.20" in said
    unsure = reason(row(measured=Estimate(1.1, 0.9, 1.3)), "cannot tell", None, 1)
    assert "2.0 times as narrow: about 4 times as many prompts" in unsure
    assert "give more prompts" in reason(row(measured=Estimate(1.1)), "cannot tell", None, 1)
    noise = Estimate(1.0, 0.95, 1.06)
    near, far = (row(measured=Estimate(value, 1.02, 1.3)) for value in (1.05, 1.1))
    assert "no more than this machine's noise, 0.95-1.06" in reason(near, "cannot tell", noise, 1)
    assert "2.0 times as narrow: about 4 times" in reason(
        far, "cannot tell", noise, 1
    )  # against the noise, not against 1
    slow = row(predicted=Estimate(0.7, 0.6, 0.8), acceptance=1.3, draft=0.6, verify=1.2, other=0.1)
    said = reason(slow, "does not pay", None, 1)
    assert " Acceptance is too low" in said and "0.00" not in said


def test_finalists_are_the_best_and_what_only_decoding_can_tell():
    rows = [row("draft", Estimate(x)) for x in (1.5, 1.4, 1.3)] + [row("suffix", Estimate(1.1))]
    unknown = Row(Candidate("mine", NgramDrafter(), SiblingRejection()))
    chosen = finalists([unknown, *rows], 3)
    assert [each.candidate.name for each in chosen] == ["draft", "draft", "suffix", "mine"]
    sure = [
        row("draft", Estimate(1.5, 1.4, 1.6)),
        row("suffix", Estimate(1.3, 1.1, 1.5)),
        row("ngram", Estimate(1, 0.9, 1.3)),
    ]
    assert [each.candidate.name for each in finalists(sure, 3)] == ["draft", "suffix"]


def test_drafters_are_named_and_made_of_models():
    draft = llama(1)
    assert [offer.name for offer in given([draft, NgramDrafter(), draft])] == ["draft 1", "your ngram", "draft 2"]
    assert isinstance(given({"mine": draft})[0].drafter, ModelDrafter)
    with pytest.raises(ValueError, match="drafters named ngram: the target's own are called so"):
        given({"ngram": draft})
    with pytest.raises(ValueError, match="the drafter 'mine' is a str; pass a drafter"):
        given({"mine": "a name"})


def test_layers_that_do_nothing_are_found_within_the_time():
    target = llama(0, eos_token_id=None, num_hidden_layers=4)
    for projection in (target.model.layers[2].self_attn.o_proj, target.model.layers[2].mlp.down_proj):
        projection.weight.data.zero_()
    written = generate(target, PROMPTS, max_new_tokens=24).tokens
    costs = layers.LayerCosts(specdec.theory.CostCurve([1, 8], [4.5, 5.0]), outside=4.1, layer=0.1)
    texts = list(zip(PROMPTS, written, strict=True))
    trial, tried = layers.found(target, texts, GREEDY, lambda: False, lambda what: None, costs)
    assert trial.skip == frozenset({2}) and trial.reach == pytest.approx([1.0] * layers.DEPTH) and tried > 4
    assert layers.found(target, texts, GREEDY, lambda: True, lambda what: None, costs)[1] == 1
    assert trial.speed_up == predicted_speed_up(1 + trial.length, range(-1, trial.length), costs.keeping(3))


@pytest.mark.parametrize(
    "name, drafter, drafters",
    [
        ("draft", ModelDrafter(llama(1), Chain(3)), {"draft": llama(1), "heads": None}),
        ("draft", ModelDrafter(llama(1), Static([-1, 0, 0, 1], Law.SAMPLED_THEN_TOP)), {"draft": llama(1)}),
        ("layers", LayerSkipDrafter(skip=[1], tree=Chain(2)), None),
        ("suffix", Paused(SuffixDrafter()), None),
        ("autoregressive", None, None),
    ],
)
def test_a_plan_is_loaded_as_it_was_saved(name, drafter, drafters, tmp_path):
    told = Speedup(Estimate(1.2, 1.1, 1.3), Estimate(1.1))
    plan = Plan(name, drafter, TraversalVerification(), told, "pays", "because", conditions={"batch": 2})
    plan.save(tmp_path / "plan.yaml")
    again = Plan.load(tmp_path / "plan.yaml", llama(0), drafters)
    assert str(again.drafter) == str(drafter) and type(again.rule) is TraversalVerification
    assert (again.name, again.speedup, again.verdict, again.reason) == (name, told, "pays", "because")
    assert again.conditions == {"batch": 2} and again.table() == plan.table() and "It holds for" in again._repr_html_()
    with pytest.raises(ValueError, match="no rows to draw"):
        again.picture()


def test_a_plan_whose_drafter_is_not_given_is_refused_with_the_cure(tmp_path):
    plan = Plan("draft", ModelDrafter(llama(1), Chain(3)), SiblingRejection(), Speedup(), "pays", "because")
    plan.save(tmp_path / "plan.yaml")
    with pytest.raises(ValueError, match=r"drafts with 'draft', which is not given: pass drafters="):
        Plan.load(tmp_path / "plan.yaml", llama(0), {"other": llama(1)})
    plan = Plan(
        "draft", None, SiblingRejection(), Speedup(), "pays", "because", conditions={"target": "Other, 2 tokens"}
    )
    plan.save(tmp_path / "plan.yaml")
    with pytest.raises(ValueError, match=r"made for another target .Other, 2 tokens. than this one .LlamaForCausalLM"):
        Plan.load(tmp_path / "plan.yaml", llama(0), {"draft": llama(1)})


@pytest.mark.parametrize(
    "wrong",
    [
        ("rule: SiblingRejection", "rule: TypicalAcceptance"),
        ("rule: SiblingRejection\n", ""),
        ("rule: SiblingRejection", "rule: [1]"),
        ("parents: [-1, 0]", "parents: [-1, 5]"),
        ("parents: [-1, 0]", "parents: abc"),
        ("skip: null", "skip: [a]"),
        ("predicted: [1.5, null, null]", "predicted: [a]"),
        ("verdict: pays", "verdict: yes"),
        ("conditions: {}", "conditions: 3"),
        ("format: specdec plan 1", "format: specdec plan 2"),
        ("reason", "{"),
    ],
)
def test_files_that_are_no_plans_are_refused_with_the_cure(wrong, tmp_path):
    path, told = tmp_path / "plan.yaml", Speedup(Estimate(1.5))
    Plan("draft", ModelDrafter(llama(1), Chain(1)), SiblingRejection(), told, "pays", "because").save(path)
    text = path.read_text()
    assert wrong[0] in text and Plan.load(path, llama(0), {"draft": llama(1)}).verdict == "pays"
    path.write_text(text.replace(*wrong))
    with pytest.raises(ValueError, match=r"not a file that Plan\.save of this version wrote.*run specdec.tune again"):
        Plan.load(path, llama(0), {"draft": llama(1)})


def test_a_table_says_what_was_found_refused_and_not_tried():
    rows = (row(predicted=Estimate(1.2, 1.1, 1.3), measured=Estimate(1.15, 1.1, 1.2)), row("suffix", Estimate(0.9)))
    plan = Plan(
        "draft", NgramDrafter(), SiblingRejection(), rows[0].speedup, "pays", "draft pays.", rows,
        {"mtp": "there is none."}, ("Time ended.",), Estimate(1.0, 0.98, 1.02), None, {"batch": 1},
    )  # fmt: skip
    said = plan.table(1)
    assert (
        "| draft | its own | SiblingRejection | 2.00 (2.00-2.00) | 1.80 | 1.20 (1.10-1.30) | 1.15 (1.10-1.20) |" in said
    )
    assert "1 more are not shown." in said and "mtp was not compared: there is none." in said
    assert "Time ended." in said and "against itself, 1.00 (0.98-1.02)" in said and "suffix" not in said


def test_probes_of_blocks_have_one_depth_a_run_and_those_of_captured_steps_one_shape():
    made = probes([Offer("draft", ModelDrafter(llama(1)))], conditions(llama(0), Sampling(1.0)))
    names = [type(probe.rule).__name__ for probe in made]
    assert names == ["SiblingRejection"] * 3 + ["BlockVerification", "TraversalVerification"]
    assert [len(probe.parents) for probe in made] == [1, 5, 4, 2, 4] and isinstance(made[0], Probe)
    held = conditions(llama(0))
    alone = Conditions(held.target, held.sampling, 1, specdec.Graphs, 16)
    assert all(len(probe.parents) == 1 for probe in probes([Offer("draft", ModelDrafter(llama(1)))], alone))
    heads = MedusaDrafter(specdec.demo.load().heads)
    of_blocks = [
        {max(depths(tree)) for tree in probe.parents.values()} for probe in probes([Offer("heads", heads)], held)[2:]
    ]
    assert of_blocks == [{2}, {min(5, heads.net.depth)}]


def test_a_rule_is_timed_with_one_drafter_and_takes_as_much_more_with_others():
    offers = [Offer(name, ModelDrafter(llama(1))) for name in ("first", "second")]
    made = probes(offers, conditions(llama(0), Sampling(1.0)))
    own = [(probe.name, type(probe.rule).__name__) for probe in made[2:]]
    names = [type(rule).__name__ for rule in rules(Sampling(1.0))]
    assert own == [("first", name) for name in names] + [("second", names[0])]
    loops = {("first", names[0]): 0.3, ("first", names[2]): 0.5, ("second", names[0]): 0.4}
    samples = {(*key, work(Chain(1).parents)): [Sample(2, 0.1, 1.0, loop)] * 3 for key, loop in loops.items()}
    found = Prices([], samples, [0.5])
    assert found.other("first", names[2], 2) == pytest.approx(0.5, rel=EXACT)
    assert found.other("second", names[2], 2) == pytest.approx(0.6, rel=EXACT)
    assert (
        found.tells("second", names[2]) and not found.tells("second", names[1]) and not found.tells("third", names[0])
    )


def test_passes_read_weights_as_they_are_stored_and_multiply_all_of_them():
    model = llama(0, hidden_size=64, intermediate_size=128)
    products, plain = roofline.products(model), sum(each.nbytes for each in roofline.parameters(model))
    assert plain == 8 * products
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CPUs on which that is slow
        specdec.store_weights(model, "int8")
    assert (
        roofline.products(model) == products
        and plain / 8 < sum(e.nbytes for e in roofline.parameters(model)) < plain / 4
    )
    assert roofline.machine(model).bandwidth > 0


@pytest.mark.parametrize("wrap", [lambda made: made, Paused, lambda made: Fallback(made, NgramDrafter())])
def test_a_search_teaches_a_drafter_nothing(wrap):
    drafter, held = SuffixDrafter(shared=True), conditions(llama(0, eos_token_id=None), Sampling(1.0))
    for _ in range(2):  # with the same seed, which texts that are remembered would refuse
        with held.stream(PROMPTS, wrap(drafter)) as run:
            first = [*run]
    assert drafter.memory.tokens == 0 and len(first) > 1
    replayed(
        wrap(drafter), [(PROMPTS, [torch.tensor([3, 4]), torch.tensor([7, 8])])], 97, GREEDY, prices(), lambda: False
    )
    assert drafter.memory.tokens == 0
    assert afresh(plain := ModelDrafter(llama(1))) is plain
