"""Simulated runs: greedy ones are the runs, times are those of the cost model, and the cost model is found again."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import specdec
from experiments.studies import simulate
from experiments.studies.simulate import calibrate, compare, method, nodes, parents_of, pooled, table
from specdec.theory import CostCurve, Costs
from specdec.trace import Step, Trace

torch.set_num_threads(1)

EXACT = 1e-9  # sums of float64
PAIR = specdec.demo.load()
PROMPTS = [torch.tensor(PAIR.tokenizer(p.text)["input_ids"]) for p in PAIR.prompts[::32]]
SETTINGS = {"sampling": specdec.Sampling(), "max_new_tokens": 12}
CASES = [((1, 1), "SiblingRejection"), ((4, 2, 1), "SiblingRejection"), ((2, 2), "TraversalVerification")]
RUNS = {simulate.label(*case): case for case in CASES}
COSTS = Costs(CostCurve((1, 40), (1.0, 2.2)), CostCurve((1, 40), (0.3, 0.9)))


def test_a_greedy_simulation_is_the_run_and_takes_what_its_steps_cost():
    costs = dict.fromkeys(("SiblingRejection", "TraversalVerification"), COSTS)
    simulated = simulate.simulate(PAIR.target, PAIR.draft, PROMPTS, SETTINGS, RUNS, costs)
    finished = [{name: [] for name in RUNS}]
    for name, case in RUNS.items():
        shapes = {nodes(case[0][:depth]): case[0][:depth] for depth in range(len(case[0]) + 1)}
        speed_ups = []
        for prompt in PROMPTS:
            out = method(PAIR.draft, *case)(PAIR.target, prompt, **SETTINGS)
            took = [COSTS.step(parents_of(shapes[step.nodes])) for step in out.trace.steps]
            speed_ups.append(len(out.tokens[0]) / sum(took))
            finished[0][name].append(SimpleNamespace(trace=out.trace))
        assert simulated[name]["speed_up"]["median"] == pytest.approx(np.median(speed_ups), rel=EXACT)
    measured = {
        name: {
            "acceptance_length": guess["acceptance_length"],
            "speed_up": {"median": 2.0, "low": 1, "high": 3, "n": 2},
        }
        for name, guess in simulated.items()
    }
    errors = compare(simulated, measured, finished)
    for name, error in errors.items():
        assert abs(error["acceptance_length"]) < EXACT and error["standard_error"] is None
        assert error["speed_up"] == simulated[name]["speed_up"]["median"] / 2 - 1
    assert "| +0.0% |" in table(RUNS, simulated, measured, errors)


@pytest.mark.parametrize("rule, once", [("SiblingRejection", 0.1), ("BlockVerification", 0.0)])
def test_a_cost_model_is_found_again_whatever_the_speed_of_the_prompt(rule, once, monkeypatch):
    """Steps take what `COSTS` says, in units that change from prompt to prompt; the last ones, being smaller, anything."""

    def generate(target, prompt, drafter=None, **settings):
        shape = drafter.tree.widths if drafter else ()
        size = nodes(shape)
        drafting = COSTS.step(parents_of(shape)) - COSTS.verify(size) + (once if shape else 0)
        unit = float(prompt[0])
        steps = [Step(size, [0], [1], [1], [1], 0.0, unit * drafting, unit, unit * (COSTS.verify(size) - 1))] * 3
        return SimpleNamespace(
            trace=Trace(steps=[*steps, *([Step(size - 1, [0], [1], [1], [1], 0.0, 9.0, 9.0, 9.0)] if shape else [])])
        )

    monkeypatch.setattr(specdec, "generate", generate)
    found = calibrate(PAIR.target, PAIR.draft, [torch.tensor([n]) for n in (1, 2, 5)], SETTINGS, rule)
    for shape in [(), (1, 1), (1, 1, 1, 1), *([] if rule == "BlockVerification" else [(4, 2, 1), (2, 2, 2, 1)])]:
        whole = COSTS.step(parents_of(shape)) + (once if shape else 0)
        assert found.step(parents_of(shape)) == pytest.approx(whole, rel=EXACT)


def test_texts_too_short_for_the_trees_that_are_timed_are_refused():
    with pytest.raises(SystemExit, match=r"new_tokens=5: .*ask for 6 or more"):
        calibrate(PAIR.target, PAIR.draft, PROMPTS, {**SETTINGS, "max_new_tokens": 5})


def test_standard_error_is_the_spread_of_repeated_runs():
    """Of 2,000 measurements, each of 3 runs of 40 prompts that differ: within 5 %."""
    random = np.random.default_rng(0)
    typical = random.uniform(10, 30, 40)
    found = [pooled(np.full((3, 40), 48), random.normal(typical, 2, (3, 40))) for _ in range(2000)]
    lengths, errors = np.array(found).T
    assert np.mean(errors) == pytest.approx(np.std(lengths), rel=0.05)
    assert pooled(np.full((1, 40), 48), typical[None])[1] is None
