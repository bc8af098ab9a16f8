"""Whichever stages the host runs beside captured ones, each step is decided on its own tree, not on that of the capture."""

import copy
import os
import random
import warnings
from functools import lru_cache
from itertools import chain, combinations

import pytest
import torch
from captured import DRAFTERS, STAGES, TARGET
from hybrid_models import HYBRIDS
from tiny_models import GATE, PROMPTS, VOCAB

import specdec
from specdec import Law, ModelTarget, Sampling
from specdec.arguments import as_request
from specdec.drafters import ModelDrafter
from specdec.loop import Decoding
from specdec.rules import LenientRejection, SiblingRejection, TraversalVerification
from specdec.testing import Tape
from specdec.trace import replay
from specdec.trees import Dynamic, Static

SEED = int(os.environ.get("SEED", "0"))  # SEED=... draws other combinations
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


# Of all drafters, those that draft for models with recurrent states too; and trees of any shape, as they are tuned.
FOR_ANY = [name for name in KINDS if not name.startswith(("layers", "features"))]
LAWS = Law.POINT, Law.IID, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP
MODELS = {
    "llama": lambda: TARGET,
    "sliding": lambda: GATE["gemma3_sliding"](dtype=torch.float64),
    "gated delta": lambda: HYBRIDS["qwen3_5"](dtype=torch.float64),
    "state space": lambda: HYBRIDS["mamba2"](dtype=torch.float64),
    "convolution": lambda: HYBRIDS["lfm2"](dtype=torch.float64),
}


@lru_cache
def pair(kind):
    """A model of this kind, and one that often agrees with it."""
    model = MODELS[kind]()
    return model, near(model)


def tree_of(choose):
    return [-1, *(choose.randrange(max(node - 3, 0), node) for node in range(1, choose.randint(2, 9)))]


class Combination:
    """A random combination of all that a step is made of, the same for the same number."""

    def __init__(self, number):
        choose = random.Random(number)
        self.kind = choose.choice([*MODELS])
        self.target, self.draft = pair(self.kind)
        self.name = choose.choice([*(KINDS if self.kind == "llama" else FOR_ANY), "tuned tree"])
        self.tree, self.law = tree_of(choose), choose.choice(LAWS)
        self.turns = [self.turn(choose) for _ in range(2)]

    def turn(self, choose):
        """Texts that share beginnings, of unequal lengths, in all rows or in few that are filled again."""
        prompts = [choose.choices(range(1, VOCAB), k=choose.choice((1, 2, 9))) for _ in range(choose.randint(1, 5))]
        if choose.random() < 0.5:
            prompts = [prompts[0] + prompt for prompt in prompts]
        return {
            "prompts": prompts,
            "max_new_tokens": [choose.choice((1, 2, 7, 16)) for _ in prompts],
            "batch_size": choose.choice((None, 1, 2)),
            "stop_tokens": choose.choice(((), (7, 11))),
            "sampling": choose.choice((Sampling(), Sampling(1.0), Sampling(0.7, top_k=5), Sampling(0.8, top_p=0.9))),
            "rule": choose.choice((SiblingRejection(), LenientRejection(0.5), TraversalVerification())),
            "trace": choose.choice(("summary", "ceiling")),
            "seed": choose.randrange(9),
        }

    def texts(self, engine):
        """(texts, how many drafted tokens were accepted) of each turn; one drafter and one engine serve all."""
        tuned = self.name == "tuned tree"
        drafter = ModelDrafter(self.draft, Static(self.tree, self.law)) if tuned else KINDS[self.name](self.draft)
        target, found = ModelTarget(self.target), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for turn in self.turns:
                made = specdec.generate(target, drafter=drafter, engine=engine, **turn)
                found.append(([t.tolist() for t in made.tokens], [s.accepted for s in made.trace.steps]))
        return found


@pytest.mark.parametrize("on_host", SUBSETS, ids="+".join)
def test_stages_on_the_host_beside_captured_ones_give_the_eager_text(on_host, monkeypatch):
    monkeypatch.setattr(specdec.engines.graphs, "_BLOCK", 16)
    for number in (SEED + SUBSETS.index(on_host), SEED + SUBSETS.index(on_host) + len(SUBSETS)):
        case = Combination(number)
        found, fixed, eager = map(case.texts, (Partly(on_host), "graph", "eager"))
        told = f"{case.name} for {case.kind}, {case.turns}"
        assert found == fixed, told
        for one, other, turn in zip(found, eager, case.turns, strict=True):
            assert one[0] == other[0] or (case.name in RENUMBERED and turn["sampling"].temperature), told


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
