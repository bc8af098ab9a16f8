"""Simulated runs: narrower trees are drawn as they would be, greedy runs exactly, sampled ones in the mean."""

import numpy as np
import pytest
import torch

from experiments.simulate import Scout, narrowed, parents_of, walk
from specdec import Law, Sampling, generate, rules
from specdec.testing import Table, TabularDrafter, TabularTarget
from specdec.trees import Widths

torch.set_num_threads(1)

EXACT = 1e-12  # sums of float64


def scouted(widths=(3, 2, 1), law=Law.SAMPLED_THEN_TOP, vocab=6, seed=0):
    """A trace with a step at every place of one text."""
    options = {"sampling": Sampling(1.0), "max_new_tokens": 8, "rule": Scout(), "trace": "laws", "seed": seed}
    drafter = TabularDrafter(Table(vocab, 4), Widths(widths, law))
    return generate(TabularTarget(vocab, 3), torch.tensor([0, 2]), drafter, stop_tokens=(), **options).trace


class Told:
    """In place of a random generator: says which choice to make, and keeps the probabilities."""

    def __init__(self, place):
        self.place, self.asked = place, []

    def choice(self, count, p):
        self.asked.append(p)
        return min(self.place, count - 1)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_first_child_of_a_narrower_tree_has_the_law_it_says(width):
    """Summed over the recorded first child and the choice: q outside the top width - 1."""
    record = scouted((4, 1)).steps[0].record
    q = record.draft.tensor()[0, 0].double()
    x, *top = record.bare.tokens[0, 1:5].tolist()
    told = Told(0)
    narrowed(record, (width,), told)
    law = torch.zeros_like(q)
    law[top[width - 1 :]] = torch.tensor(told.asked[0][:-1])
    outside = q.scatter(0, torch.tensor(top), 0)
    law += told.asked[0][-1] * outside / outside.sum()  # the recorded first child is drawn from these
    expected = q.scatter(0, torch.tensor(top[: width - 1], dtype=torch.int64), 0)
    assert law.numpy() == pytest.approx((expected / expected.sum()).numpy(), abs=EXACT)
    for place in range(len(told.asked[0])):
        found = narrowed(record, (width,), Told(place)).bare
        assert found.tokens[0, 1:].tolist() == [[*top[width - 1 :], x][place], *top[: width - 1]]
        assert found.laws[0, 0] == Law.SAMPLED_THEN_TOP


@pytest.mark.parametrize("law", [Law.POINT, Law.IID, Law.WITHOUT_REPLACEMENT], ids=lambda law: law.name)
@pytest.mark.parametrize("widths", [(1, 1), (2, 1), (3,), (2, 2, 1)], ids=str)
def test_other_laws_keep_the_first_children_and_what_belongs_to_them(law, widths):
    record = scouted((3, 3, 2), law).steps[0].record
    new, parents = narrowed(record, widths, np.random.default_rng(0)), parents_of(widths)
    assert new.bare.topology.parents[0].tolist() == parents and new.bare.topology.depth == len(widths)
    old, wide = [0], parents_of((3, 3, 2))
    for node, parent in enumerate(parents[1:], 1):
        siblings = [child for child, above in enumerate(wide) if above == old[parent]]
        old.append(siblings[parents[1:node].count(parent)])
    assert torch.equal(new.bare.tokens, record.bare.tokens[:, old])
    assert torch.equal(new.target.tensor(), record.target.tensor()[:, old])
    if law != Law.POINT:
        inner = sorted(set(parents[1:]))
        assert torch.equal(new.draft.tensor(), record.draft.tensor()[:, [old[node] for node in inner]])
        assert {int(new.bare.laws[0, node]) for node in inner} == {law}


def test_where_the_top_is_all_there_is_nothing_is_drawn():
    sampling = Sampling(1.0, top_k=2)
    drafter, options = (
        TabularDrafter(Table(6, 4), Widths((4,))),
        {"rule": Scout(), "trace": "laws", "max_new_tokens": 3},
    )
    record = (
        generate(TabularTarget(6, 3), torch.tensor([0]), drafter, sampling=sampling, **options).trace.steps[0].record
    )
    for width, law in ((1, Law.SAMPLED_THEN_TOP), (2, Law.SAMPLED_THEN_TOP), (3, Law.POINT)):
        found = narrowed(record, (width,), np.random.default_rng(0)).bare
        assert found.laws[0, 0] == law and found.tokens.shape[1] == 1 + min(width, 2)


@pytest.mark.parametrize("rule", ["SiblingRejection", "TraversalVerification"])
@pytest.mark.parametrize("widths", [(1, 1, 1), (2, 1), (3, 2)], ids=str)
def test_a_greedy_simulation_is_the_run(widths, rule):
    target, draft, rule = TabularTarget(5, 3), Table(5, 6), getattr(rules, rule)()
    found = []
    for prompt in torch.arange(16).remainder(5).view(-1, 2):
        options = {"max_new_tokens": 12, "stop_tokens": (4,)}
        scout = generate(
            target, prompt, TabularDrafter(draft, Widths((3, 2, 1))), rule=Scout(), trace="laws", **options
        )
        own = generate(target, prompt, TabularDrafter(draft, Widths(widths)), rule=rule, **options)
        found += walk(scout.trace, widths, rule, 0)
        assert found[-len(own.trace.steps) :] == [step.emitted[0] for step in own.trace.steps]
    assert max(found) > 1


def test_sampled_simulations_have_the_length_of_runs():
    """Within three standard errors."""
    rule, widths = rules.SiblingRejection(), (2, 2)
    simulated = [n for seed in range(20) for n in walk(scouted(seed=1000 + seed), widths, rule, seed)]
    options = {"sampling": Sampling(1.0), "max_new_tokens": 8, "stop_tokens": (), "rule": rule}
    prompts = [torch.tensor([0, 2])] * 200
    steps = generate(TabularTarget(6, 3), prompts, TabularDrafter(Table(6, 4), Widths(widths)), **options).trace.steps
    run = [n for step in steps for n in step.emitted if n]
    error = (np.var(simulated) / len(simulated) + np.var(run) / len(run)) ** 0.5
    assert abs(np.mean(simulated) - np.mean(run)) < 3 * error < 0.4
