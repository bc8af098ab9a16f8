"""Ceilings against linear programs and against what rules reach; trees and times against enumeration."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_array
from tiny_models import PROMPTS, llama
from transformers import GenerationConfig

from experiments.studies.simulate import parents_of
from specdec import Law, Sampling, generate
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.laws import SAMPLED, drafts, is_random
from specdec.rules import BlockVerification, KSeq, SiblingRejection, TraversalVerification
from specdec.testing import Table, TabularDrafter, TabularTarget, exact_law
from specdec.testing.drafters import Noting
from specdec.theory import (
    CostCurve,
    Costs,
    best_chain_length,
    best_tree,
    chain_optimum,
    expected_length,
    longest_tree,
    measure_costs,
    one_step_ceiling,
    predicted_speed_up,
)
from specdec.theory.ceilings import _all_among_first
from specdec.trace import Trace, positional_acceptance
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)

SOLVED = 1e-6  # HiGHS is content when constraints hold to 1e-7
QUADRATURE = 1e-12  # what `_STEP` and `_DECAY` are chosen for
RANDOM = np.random.default_rng(0)


def random_law(vocab, sharpness=2.0, zeros=False):
    law = np.exp(sharpness * RANDOM.normal(size=vocab))
    if zeros:
        law[RANDOM.permutation(vocab)[: RANDOM.integers(0, vocab - 1)]] = 0
    return law / law.sum()


def best_coupling(p, drawn):
    """The optimal transport by linear programming: mass flows from draws to tokens, gaining 1 inside the draw."""
    inside = [(s, x) for s, xs in enumerate(drawn) for x in set(xs)]
    rows, columns = zip(
        *[pair for i, (s, x) in enumerate(inside) for pair in ((s, i), (len(drawn) + x, i))], strict=True
    )
    limits = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(drawn) + len(p), len(inside)))
    return -linprog(-np.ones(len(inside)), limits.tocsr(), [*drawn.values(), *p]).fun


def points(q, law, count):
    """The most probable tokens, as many as children are certain."""
    certain = sum(not is_random(law, slot) for slot in range(count))
    return np.argsort(-q, kind="stable")[:certain].tolist()


@pytest.mark.parametrize("law", [Law.POINT, *SAMPLED], ids=lambda law: law.name)
def test_one_step_ceiling_is_the_optimal_transport(law):
    for trial in range(60):
        vocab, count = int(RANDOM.integers(3, 7)), int(RANDOM.integers(1, 4))
        p, q = (random_law(vocab, RANDOM.choice([0.5, 2, 5]), zeros=trial % 3 == 0) for _ in "pq")
        top = [x for x in points(q, law, count) if q[x] > 0]
        if law == Law.SAMPLED_THEN_TOP and q[top].sum() > 1 - 1e-12:
            continue  # no law is left for the first child: the children are POINT
        expected = best_coupling(p, drafts(law, q, count))
        assert one_step_ceiling(p, law, q, count=count, top=top) == pytest.approx(expected, abs=SOLVED)


def test_ceiling_without_replacement_survives_laws_of_any_scale():
    """Against the sum over pairs that two draws have in closed form."""
    q = np.sort(10.0 ** -RANDOM.uniform(0, 25, 60))
    q /= q.sum()
    odds = q / (1 - q)
    odds[-1] = q[-1] / q[:-1].sum()  # without the cancellation in 1 - q
    expected = np.cumsum(q) * np.cumsum(odds) - np.cumsum(q * odds)
    assert _all_among_first(q, 2) == pytest.approx(expected, abs=QUADRATURE)


def test_a_law_that_is_none_is_refused():
    with pytest.raises(ValueError, match="non-negative weights"):
        one_step_ceiling([0.5, -0.5], Law.POINT, top=[0])
    with pytest.raises(ValueError, match="law=IID, q=None: give"):
        one_step_ceiling([0.5, 0.5], Law.IID)
    with pytest.raises(ValueError, match="no child is certain under law=IID"):
        one_step_ceiling([0.5, 0.5], Law.IID, [0.5, 0.5], top=[0])


def first_step(law, rule, width=2):
    """(drafted tokens that the first step accepts in expectation, by enumeration; the ceiling of its one node)."""
    target, draft, prompt = TabularTarget(4, 3), Table(4, 1), (0, 2)
    drafter = TabularDrafter(draft, Widths((width,), law))
    found = exact_law(target, prompt, drafter, rule=rule, max_new_tokens=2)
    p, q = (table.logits(prompt).softmax(0).numpy() for table in (target, draft))
    return found.expected_tokens - 1, one_step_ceiling(p, law, q, count=width, top=points(q, law, width))


@pytest.mark.parametrize("law", [Law.POINT, Law.SAMPLED_THEN_TOP], ids=lambda law: law.name)
def test_sibling_rejection_reaches_the_ceiling(law):
    accepted, ceiling = first_step(law, SiblingRejection())
    assert accepted == pytest.approx(ceiling, abs=1e-12)


@pytest.mark.parametrize("law", [Law.IID, Law.WITHOUT_REPLACEMENT], ids=lambda law: law.name)
def test_no_rule_exceeds_the_ceiling_of_one_node(law):
    for rule in (SiblingRejection(), TraversalVerification(), *([KSeq()] if law == Law.IID else [])):
        accepted, ceiling = first_step(law, rule)
        assert 0.8 * ceiling < accepted < ceiling, rule


def traced(drafter, temperature=1.0, **options):
    prompts = [torch.tensor([b % 4, b // 4]) for b in range(16)]
    options = {"sampling": Sampling(temperature), "max_new_tokens": 40, "stop_tokens": (3,), **options}
    return generate(TabularTarget(12, 3), prompts, drafter, **options)


@pytest.mark.parametrize("law", SAMPLED, ids=lambda law: law.name)
def test_recording_ceilings_changes_no_text(law):
    drafter = TabularDrafter(Table(12, 3), Widths((2, 2), law))
    plain, out = traced(drafter), traced(drafter, trace="ceiling")
    assert all(map(torch.equal, plain.tokens, out.tokens))
    assert "ceiling_share" not in plain.summary() and plain.trace.steps[0].visits is None
    for step in out.trace.steps:
        assert [len(row) for row in step.visits] == step.tried
        assert [sum(visit.slot is not None for visit in row) for row in step.visits] == step.accepted


def test_share_of_the_ceiling_is_one_for_the_best_rule():
    drafter = TabularDrafter(Table(12, 4), Widths((2, 2)))
    steps = [s for seed in range(2) for s in traced(drafter, seed=seed, stop_tokens=(), trace="ceiling").trace.steps]
    visits = [visit for step in steps for row in step.visits for visit in row]
    deviation = sum(v.ceiling * (1 - v.ceiling) for v in visits) ** 0.5 / sum(v.ceiling for v in visits)
    assert abs(Trace(steps=steps).summary()["ceiling_share"] - 1) < 3 * deviation < 0.1


@pytest.mark.parametrize(
    "drafter", [NgramDrafter(2), TabularDrafter(Table(12, 3), Dynamic(5, 2, 2))], ids=["n-gram", "dynamic"]
)
def test_share_of_the_ceiling_is_one_at_temperature_0(drafter):
    assert traced(drafter, 0.0, trace="ceiling").summary()["ceiling_share"] == 1


def test_ceilings_are_those_of_the_text_that_processors_read():
    """A law after another text would be another token's, and the share not 1."""
    config = GenerationConfig(do_sample=False, repetition_penalty=1.5, eos_token_id=7, pad_token_id=0)
    drafter = ModelDrafter(llama(1, num_hidden_layers=1), Widths((3, 2)))
    options = {"sampling": Sampling.from_generation_config(config), "max_new_tokens": 24}
    out = generate(llama(), PROMPTS, drafter, trace="ceiling", **options)
    assert sum(len(row) for step in out.trace.steps for row in step.visits) > 50
    assert out.summary()["ceiling_share"] == 1


def test_without_drafts_there_is_no_ceiling():
    assert "ceiling_share" not in traced(None, trace="ceiling").summary()


def toy(seed):
    table = Table(3, seed)
    return table, lambda text: table.logits(text).softmax(0).numpy()


@pytest.mark.parametrize("seed", range(3))
def test_chain_optimum_is_what_block_verification_reaches(seed):
    (_, p), (table, q) = toy(seed), toy(seed + 50)
    prompt, target = (0, 1), TabularTarget(3, seed)
    drafter, optimum = TabularDrafter(table, Chain(2)), chain_optimum(p, q, 2, prompt)
    block, sibling = (
        exact_law(target, prompt, drafter, rule=rule, max_new_tokens=3)
        for rule in (BlockVerification(), SiblingRejection())
    )
    assert block.expected_tokens == pytest.approx(optimum, abs=1e-12)
    assert sibling.expected_tokens <= optimum


def test_block_verification_example_of_the_paper():
    """p = (1/3, 2/3), q = (2/3, 1/3) at every text: 11/9 of 2 drafted tokens are accepted."""
    assert chain_optimum(lambda _: [1 / 3, 2 / 3], lambda _: [2 / 3, 1 / 3], 2) == pytest.approx(1 + 11 / 9, abs=1e-12)


def test_expected_length_adds_up_the_paths():
    """(1/2, 1/4) below the root, (1/8) below its first child: 1 + 1/2 + 1/4 + 1/16."""
    assert expected_length([-1, 0, 0, 1], [[0.5, 0.25], [0.125]]) == 1.8125
    with pytest.raises(ValueError, match="child 1 at depth 1, where acceptance is not known"):
        expected_length([-1, 0, 1, 1], [[0.5, 0.25], [0.125]])


@pytest.mark.parametrize("law", SAMPLED, ids=lambda law: law.name)
def test_positional_acceptance_gives_back_the_acceptance_length(law):
    """In expectation over depths that depend on each other little: to 5 %."""
    out = traced(TabularDrafter(Table(12, 4), Widths((2, 2), law)), trace="ceiling", stop_tokens=())
    acceptance = positional_acceptance(out.trace)
    assert [sum(level) for level in acceptance] == pytest.approx(out.summary()["acceptance_rate"])
    expected = expected_length([-1, 0, 0, 1, 1, 2, 2], acceptance)
    assert expected == pytest.approx(out.summary()["acceptance_length"], rel=0.05)


@pytest.mark.parametrize("widths", [(1, 1, 1), (4, 2, 1), (2, 3)], ids=str)
def test_predictions_are_for_the_tree_that_is_drafted(widths):
    noting = Noting(TabularDrafter(Table(12), Widths(widths)))
    generate(TabularTarget(12), torch.tensor([0]), noting, max_new_tokens=8)
    assert noting.drafts[0].parents == parents_of(widths)


COSTS = Costs(CostCurve((1, 3, 33), (1.0, 2.0, 5.0)), CostCurve((1, 5), (0.1, 0.2)))
FLAT = Costs(CostCurve((1, 33), (1.0, 2.0)), CostCurve((1, 33), (0.1, 0.1)))  # drafting costs by levels only


def test_a_step_costs_a_draft_per_level_and_one_verification():
    tree = [-1, 0, 0, 1, 2]  # drafted from the root, then from two nodes at once
    assert COSTS.step(tree) == pytest.approx(0.1 + 0.125 + 2.2)
    assert predicted_speed_up(3.0, tree, COSTS) == pytest.approx(3.0 / 2.425)
    assert predicted_speed_up(1.0, [-1], COSTS) == 1
    with pytest.raises(ValueError, match="34 nodes: costs were measured from 1 to 33"):
        COSTS.verify(34)


def test_best_chain_is_as_long_as_it_pays():
    assert best_chain_length([0.9] * 6, COSTS) == 6
    assert best_chain_length([0.9, 0.9, 0.0, 0.9], COSTS) == 2
    assert best_chain_length([0.1] * 6, COSTS) == 0


def every_tree(acceptance, nodes):
    """All trees whose children fill slots in order, up to `nodes` nodes."""
    trees, found = [[-1]], []
    while trees:
        tree = trees.pop()
        found.append(tree)
        trees += [[*tree, node] for node in range(max(tree[-1], 0), len(tree)) if len(tree) < nodes]
    for tree in found:
        with suppress(ValueError):
            yield expected_length(tree, acceptance), tree


def test_best_tree_is_the_best_of_all():
    for _ in range(20):
        acceptance = [RANDOM.dirichlet([2, 1, 1, 1])[:3].tolist() for _ in range(3)]  # later slots may be better
        fastest = max(predicted_speed_up(length, tree, FLAT) for length, tree in every_tree(acceptance, 7))
        tree = best_tree(acceptance, FLAT, 7)
        assert predicted_speed_up(expected_length(tree, acceptance), tree, FLAT) == pytest.approx(fastest)


def test_longest_tree_is_the_longest_of_its_size():
    for _ in range(20):
        acceptance = [RANDOM.dirichlet([2, 1, 1, 1])[:3].tolist() for _ in range(3)]
        longest = max(length for length, tree in every_tree(acceptance, 7) if len(tree) == 7)
        tree = longest_tree(acceptance, 7)
        assert len(tree) == 7 and expected_length(tree, acceptance) == pytest.approx(longest)


def test_best_tree_is_the_root_when_drafting_does_not_pay():
    assert best_tree([[0.05, 0.01]], COSTS) == [-1]


def test_measured_costs_grow_with_the_model():
    model, draft = llama(num_hidden_layers=6), llama(num_hidden_layers=1)
    costs = measure_costs(model, draft, nodes=(2, 8), context=16, repeats=5)
    assert costs.verify.nodes == (1, 2, 8)
    assert all(0 < costs.draft(n) < costs.verify(n) for n in (1, 2, 8))
