"""The whole search, on a clock that ticks: every step takes the same time, so that accepted drafts are all that counts."""

from itertools import count

import pytest
import torch
from tiny_models import llama

import specdec
from specdec import Sampling, generate
from specdec.clock import told_by
from specdec.drafters import Fallback, ModelDrafter, NgramDrafter, Paused
from specdec.models.memory import DoesNotFit
from specdec.training.skip_search import Trial
from specdec.tuning import conditions, layers, shapes
from specdec.tuning import tune as tuning
from specdec.tuning.budget import Budget
from specdec.tuning.conditions import Conditions

torch.set_num_threads(1)
tune_module = __import__("sys").modules["specdec.tuning.tune"]
PROMPTS = [torch.tensor([3, 4, 3, 4, 3]), torch.tensor([7, 8, 9, 7, 8, 9])]
OPTIONS = {"max_new_tokens": 12, "seconds": 150, "progress": False}
TARGET = llama(0, eos_token_id=None)


@pytest.fixture(autouse=True)
def ticking(monkeypatch):
    """A budget of so many looks at it, and steps whose parts take a tick each."""
    looks, ticks = count(), count()
    monkeypatch.setattr(
        tune_module, "Budget", lambda seconds, shown: Budget(seconds, shown, lambda: float(next(looks)))
    )
    monkeypatch.setattr(tune_module, "steadily", lambda device: told_by(lambda: float(next(ticks))))
    monkeypatch.setattr(shapes, "NODES", 10)  # small trees are soon foretold
    monkeypatch.setattr(tune_module.roofline, "machine", lambda model: tune_module.roofline.Machine(1e9, 1e9))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
def test_a_draft_that_is_the_target_is_chosen_and_its_longest_trees_are_the_best(sampling):
    plan = specdec.tune(TARGET, PROMPTS, {"twin": TARGET, "other": llama(1)}, own=(), sampling=sampling, **OPTIONS)
    assert plan.name == "twin" and plan.verdict == "pays" and plan.speedup.measured.value > 2
    assert plan.rows[0].foretold.acceptance.value > 3
    told = plan.speedup
    assert told.predicted.value == pytest.approx(told.measured.value, rel=0.15)
    assert {row.candidate.name for row in plan.rows} == {"twin", "other"}
    out = generate(TARGET, PROMPTS, plan.drafter, rule=plan.rule, sampling=sampling, max_new_tokens=12)
    assert len(out.tokens[0]) == 12
    assert plan.roofline.parts()["drafting"] > 0 and sum(plan.roofline.parts().values()) == pytest.approx(1)


def test_what_the_target_offers_is_compared_and_what_it_lacks_is_said():
    plan = specdec.tune(llama(0, eos_token_id=None, num_hidden_layers=3), PROMPTS, **OPTIONS)
    assert {row.candidate.name for row in plan.rows} == {"ngram", "suffix"}
    assert "times the speed" in plan.refused["layers"]  # on this clock a layer takes no time
    assert any(isinstance(row.candidate.drafter, Paused) for row in plan.rows)
    assert "mtp was not compared" in plan.table()


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_layers_are_left_out_if_that_is_foretold_to_pay(speed, monkeypatch):
    monkeypatch.setattr(layers, "found", lambda *given: (Trial(frozenset({1}), [0.9], 1, speed), 7))
    plan = specdec.tune(TARGET, PROMPTS, own=("layers",), **OPTIONS)
    if speed > 1:
        assert {row.candidate.name for row in plan.rows} == {"layers"}
        assert any("Layers left out: [1], the best of 7 sets" in note for note in plan.notes)
    else:
        assert not plan.rows and plan.name == "autoregressive" and "0.90 times the speed" in plan.refused["layers"]


def test_given_texts_are_foretold_from_and_not_written_again(monkeypatch):
    made = generate(TARGET, PROMPTS, max_new_tokens=12).tokens
    asked = {"own": ("ngram",), **OPTIONS, "max_new_tokens": 10}
    written = specdec.tune(TARGET, PROMPTS, **asked)
    monkeypatch.setattr(tune_module, "write", None)
    plan = specdec.tune(TARGET, PROMPTS, texts=made, **asked)
    first, again = (
        {str(row.candidate.drafter): row.foretold.acceptance for row in each.rows} for each in (written, plan)
    )
    assert first == again and len(first) == 2


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ([[1, 2]], "texts: there are 1, and 2 prompts"),
        ([[1, 2], [3, 10**6]], r"texts\[1\].*1000000"),
        ([[1], []], "none has two tokens"),
        ("abc", "texts"),
    ],
)
def test_texts_that_cannot_be_foretold_from_are_refused(texts, error):
    with pytest.raises(ValueError, match=error):
        specdec.tune(TARGET, PROMPTS, texts=texts, **OPTIONS)


def test_drafters_that_do_not_fit_are_left_out_with_the_reason():
    class Broken(NgramDrafter):
        def start(self, target, batch, last=None):
            raise RuntimeError("it is broken")

    def missing():
        raise OSError("there is no such folder")

    drafters = {
        "small": llama(1, vocab_size=40),
        "broken": Broken(),
        "missing": missing,
        "word": "x",
        "fits": lambda: TARGET,
    }
    plan = specdec.tune(TARGET, PROMPTS, drafters, own=(), **OPTIONS)
    assert "vocabulary has 40 tokens" in plan.refused["small"] and plan.name == "fits"
    assert plan.refused["broken"] == "RuntimeError: it is broken" and "no such folder" in plan.refused["missing"]
    assert "is a str; pass a drafter" in plan.refused["word"]


def test_drafters_that_cannot_be_foretold_are_decoded():
    drafters = {"both": Fallback(NgramDrafter(), ModelDrafter(TARGET))}
    plan = specdec.tune(TARGET, PROMPTS, drafters, own=(), **OPTIONS)
    [row] = plan.rows
    assert row.foretold is None and row.speedup.predicted is None and row.speedup.measured.value > 2
    assert plan.drafter is drafters["both"]


def test_a_batch_is_foretold_and_decoded_as_a_batch():
    plan = specdec.tune(TARGET, PROMPTS[:1], {"twin": TARGET}, own=("ngram",), batch_size=3, **OPTIONS)
    assert plan.conditions["batch"] == 3 and plan.name == "twin"


def test_too_little_time_is_said():
    plan = specdec.tune(TARGET, PROMPTS, {"twin": TARGET}, own=(), **{**OPTIONS, "seconds": 3})
    assert plan.verdict == "cannot tell" or "no time to decode" in " ".join(plan.notes)
    assert any("time" in note.lower() for note in plan.notes)


def test_texts_are_written_eight_at_a_time_and_as_many_used_as_time_allows():
    prompts, wide = [torch.tensor([3, 4, 3, i]) for i in range(40)], []
    score = specdec.ModelTarget.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specdec.ModelTarget, "start", lambda *a, **k: (wide.append(len(a[1])), score(*a, **k))[1])
        plan = specdec.tune(TARGET, prompts, {"twin": TARGET}, own=(), **{**OPTIONS, "seconds": 10})
    assert max(wide) == 8 and plan.conditions["texts"] % 8 == 0 and plan.rows[0].foretold.texts >= 4


def test_where_one_row_fits_texts_are_written_one_at_a_time_and_no_run_is_kept(monkeypatch):
    start, kept, said = specdec.ModelTarget.start, Conditions.kept, []

    def small(self, batch, *args):
        if len(batch) > 1:
            raise DoesNotFit(f"{len(batch)} rows")
        return start(self, batch, *args)

    monkeypatch.setattr(specdec.ModelTarget, "start", small)
    monkeypatch.setattr(conditions, "free_memory", lambda device: 1)
    monkeypatch.setattr(Conditions, "kept", lambda self, run: (said.append(kept(self, run)), said[-1])[1])
    plan = specdec.tune(TARGET, PROMPTS, {"twin": TARGET}, own=(), **OPTIONS)
    assert plan.name == "twin" and plan.conditions["texts"] == 2 and said and not any(said)


@pytest.mark.parametrize("place, rows", [("written", False), ("timed", True), ("foretold", True), ("decoded", True)])
def test_an_interrupt_leaves_the_plan_so_far(place, rows, monkeypatch):
    class Interrupted(Budget):
        def say(self, what):
            timed = what.startswith("timing") and next(self.turns) == 9
            if timed if place == "timed" else what.startswith(SAID[place]):
                monkeypatch.setattr(Interrupted, "say", Budget.say)
                raise KeyboardInterrupt

    Interrupted.turns = count()
    looks = count()
    monkeypatch.setattr(tune_module, "Budget", lambda *a: Interrupted(*a, lambda: float(next(looks))))
    plan = specdec.tune(TARGET, PROMPTS, {"twin": TARGET}, own=("ngram",), **{**OPTIONS, "seconds": 1e9})
    assert "interrupted" in " ".join(plan.notes)
    assert {row.candidate.name for row in plan.rows} == ({"twin", "ngram"} if rows else set())


SAID = {"written": "letting", "timed": "timing", "foretold": "foretelling", "decoded": "decoding"}


def test_prompts_that_cannot_be_decoded_are_left_out_and_noted():
    target = llama(0, eos_token_id=None, max_position_embeddings=32)
    plan = specdec.tune(target, [PROMPTS[0], torch.arange(3, 33)], {"twin": target}, own=(), **OPTIONS)
    assert "prompt 1 has 30 tokens" in plan.notes[0] and plan.conditions["prompts"] == 1
    with pytest.raises(ValueError, match="No prompt can be decoded: prompt 0 has 30 tokens"):
        specdec.tune(target, [torch.arange(3, 33)], own=(), **OPTIONS)
    with pytest.raises(ValueError, match="prompts is an empty list"):
        specdec.tune(target, [], own=(), **OPTIONS)


def test_what_is_not_there_is_refused_with_what_is():
    with pytest.raises(ValueError, match="there is no 'medusa'; choose from ngram, suffix, layers, mtp"):
        specdec.tune(TARGET, PROMPTS, own=("medusa",), **OPTIONS)
    assert tuning is specdec.tune
