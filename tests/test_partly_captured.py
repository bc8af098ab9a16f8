"""Whichever stages the host runs beside captured ones, each step is decided on its own tree, not on that of the capture."""

import copy
import random
import warnings
from itertools import chain, combinations

import pytest
import torch
from captured import DRAFTERS, STAGES, TARGET
from tiny_models import PROMPTS

import specdec
from specdec import Sampling
from specdec.arguments import as_request
from specdec.drafters import ModelDrafter
from specdec.loop import Decoding
from specdec.rules import LenientRejection, SiblingRejection
from specdec.testing import Tape
from specdec.trace import replay
from specdec.trees import Dynamic

SUBSETS = [(), *((stage,) for stage in STAGES), *combinations(STAGES, 2)]


def near(model, noise=0.005):
    """A model that often agrees with this one."""
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(2)
    for parameter in made.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return made


DRAFT = near(TARGET)
# and beams, whose shape is never twice the same
KINDS = {**DRAFTERS, "beams": lambda draft: ModelDrafter(draft, Dynamic(7, 4, 3))}
RENUMBERED = ("dynamic", "beams")  # cut at the budget their nodes have other numbers, and so other coins


class Partly(specdec.Graphs):
    """Captures all stages but some."""

    def __init__(self, on_host):
        super().__init__(capture=Tape)
        self.on_host = on_host

    def stages(self, device):
        made = super().stages(device)
        perform = made.perform

        def partly(key, stage, reason, *args):
            left_out = stage.__name__.strip("_") in self.on_host
            return perform(key, stage, reason or ("left out here" if left_out else None), *args)

        made.perform = partly
        return made


def generated(name, engine, **options):
    settings = {"prompts": PROMPTS[1:3], "max_new_tokens": 20, "stop_tokens": ()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return specdec.generate(TARGET, drafter=KINDS[name](DRAFT), engine=engine, **{**settings, **options})


def drawn(case):
    """A combination of everything that a step is made of."""
    choose = random.Random(case)
    name, sampling = choose.choice([*KINDS]), choose.choice([Sampling(), Sampling(1.0), Sampling(0.7, top_k=5)])
    rule, level = choose.choice([SiblingRejection(), LenientRejection(0.5)]), choose.choice(["summary", "ceiling"])
    return name, {"sampling": sampling, "rule": rule, "trace": level, "seed": case}


@pytest.mark.parametrize("on_host", SUBSETS, ids="+".join)
def test_stages_on_the_host_beside_captured_ones_give_the_eager_text(on_host):
    for case in range(3):
        name, options = drawn(len(SUBSETS) * case + SUBSETS.index(on_host))
        eager, fixed, found = (generated(name, engine, **options) for engine in ("eager", "graph", Partly(on_host)))
        assert [s.accepted for s in found.trace.steps] == [s.accepted for s in fixed.trace.steps]
        end = -4 if name in RENUMBERED and options["sampling"].temperature else None
        assert [t[:end].tolist() for t in found.tokens] == [t[:end].tolist() for t in eager.tokens]


@pytest.mark.parametrize("on_host", [("score",), ("decide",), ("commit",)], ids="+".join)
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_a_tree_that_changes_its_shape_is_seen_as_it_is(on_host, temperature):
    options = {"sampling": Sampling(temperature), "trace": "ceiling"}
    fixed, found = (generated("beams", engine, **options) for engine in ("graph", Partly(on_host)))
    assert [s.visits for s in found.trace.steps] == [s.visits for s in fixed.trace.steps]
    assert found.summary()["acceptance_length"] > 1.2


def test_recorded_steps_are_those_that_were_made():
    for sampling in (Sampling(), Sampling(1.0)):
        trace = generated("beams", specdec.Graphs(capture=Tape), sampling=sampling, trace="laws").trace
        again = replay(trace, SiblingRejection())
        for step, other in zip(trace.steps, again.steps, strict=True):
            assert torch.equal(step.record.decisions.token, other.record.decisions.token)
            assert step.accepted == other.accepted


def test_results_of_a_step_stay_what_they_were():
    drafter, engine = ModelDrafter(DRAFT, Dynamic(7, 4, 3)), specdec.Graphs(capture=Tape)
    with Decoding(as_request(TARGET, PROMPTS, drafter, engine=engine)) as run:
        kept = [run.step() for _ in range(6)]
        told = [step.emitted for step in kept]
        assert [[*chain(*row)] for row in zip(*told, strict=True)] == run.emitted


def test_stages_that_are_not_in_step_with_each_other_are_captured_as_well(monkeypatch):
    """An interrupted step leaves the draft one step ahead of all that follows."""
    drafter, options = ModelDrafter(DRAFT, Dynamic(7, 4, 3)), {"prompts": PROMPTS[1:3], "stop_tokens": ()}
    for ahead in (1, 2):
        engine = specdec.Graphs(capture=Tape)
        for _ in range(ahead):
            request = as_request(TARGET, drafter=drafter, engine=engine, max_new_tokens=20, **options)
            with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch, Decoding(request) as run:
                patch.setattr(run, "_score", interrupted)
                run.step()
        trace = specdec.generate(TARGET, drafter=drafter, engine=engine, max_new_tokens=20, **options).trace
        expected = specdec.generate(TARGET, drafter=drafter, engine="graph", max_new_tokens=20, **options).trace
        assert [s.accepted for s in trace.steps] == [s.accepted for s in expected.steps]
        assert engine.captured == 4


def interrupted(tree):
    raise KeyboardInterrupt


interrupted.__name__ = "_score"
