"""Trees of one fixed shape: the shape asked for, lossless under every law, and the target's greedy text."""

import json

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny_models import PROMPTS, llama, reference

import specdec
from experiments.bench.results import ROOT
from specdec import Law, Sampling
from specdec.drafters import ModelDrafter
from specdec.testing import Table, TabularDrafter, TabularTarget, exact_law, target_law
from specdec.theory import expected_length, longest_tree
from specdec.trees import Static, Widths

torch.set_num_threads(1)
RAGGED = [-1, 0, 0, 0, 1, 1, 2, 4, 7]
LAWS = [Law.POINT, Law.IID, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("parents", [[-1, 0, 0, 1], [-1, 0, 0, 2], [-1, 0, 1, 1]], ids=str)
def test_sampled_text_is_lossless(law, parents):
    target, drafter = TabularTarget(3, seed=2), TabularDrafter(Table(3, seed=3), Static(parents, law))
    options = {"sampling": Sampling(1.0), "max_new_tokens": 3, "stop_tokens": (2,)}
    law = exact_law(target, (0, 1, 0), drafter, **options)
    assert law.total_variation(target_law(target, (0, 1, 0), **options)) == 0


@pytest.mark.parametrize("law", LAWS)
def test_greedy_text_equals_transformers_generate(law):
    model = llama()
    drafter = ModelDrafter(llama(1), Static(RAGGED, law))
    out = specdec.generate(model, PROMPTS, drafter, max_new_tokens=24)
    assert [t.tolist() for t in out.tokens] == [reference(model, p).tolist() for p in PROMPTS]
    out = specdec.generate(model, PROMPTS, ModelDrafter(model, Static(RAGGED, law)), max_new_tokens=24, stop_tokens=())
    assert (
        min(out.summary()["acceptance_rate"]) == 1
    )  # a model that drafts for itself is always accepted, to the last depth


def test_the_shape_of_widths_drafts_what_widths_does():
    parents = [-1, 0, 0, 1, 1, 2, 2]
    options = {"sampling": Sampling(0.8), "seed": 3, "max_new_tokens": 32}
    model, draft = llama(), llama(1)
    for law in LAWS:
        ours = specdec.generate(model, PROMPTS, ModelDrafter(draft, Static(parents, law)), **options)
        theirs = specdec.generate(model, PROMPTS, ModelDrafter(draft, Widths((2, 2), law)), **options)
        assert all(map(torch.equal, ours.tokens, theirs.tokens))


@pytest.mark.parametrize("parents", [[], [-1], [0, 0], [-1, 1], [-1, 0, 3]], ids=str)
def test_shapes_that_are_none_are_refused(parents):
    with pytest.raises(ValueError, match="parents="):
        Static(parents)


def test_the_sequoia_option_is_the_tree_of_which_most_is_accepted_where_it_was_calibrated():
    sequoia, widths = (instantiate(OmegaConf.load(ROOT / f"conf/tree/{name}.yaml")) for name in ("sequoia", "static"))
    results = ROOT / "experiments/results/calibrate_tree_demo_cpu_20261121_longest.json"
    acceptance = json.loads(results.read_text("utf-8"))["acceptance"]
    assert list(sequoia.parents) == longest_tree(acceptance, 21)
    assert len(widths.parents) == 21 and sequoia.parents.count(0) > 1 and sequoia.parents.count(1) > 1
    assert expected_length(sequoia.parents, acceptance) > expected_length(widths.parents, acceptance)
