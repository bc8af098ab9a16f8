"""Traces: times are of the whole step; with laws, a recorded step is decided again exactly, from memory and from a file."""

import time
import warnings
from contextlib import suppress
from itertools import product

import pytest
import torch
from tiny_models import PROMPTS, llama
from transformers import GenerationConfig

from specdec import Law, Sampling, generate, rules, trace
from specdec.batch import Batch
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.prompts import as_prompts
from specdec.testing import Table, TabularDrafter, TabularTarget
from specdec.trace.laws import Packed
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)

RULES = {
    name: getattr(rules, name)()
    for name in rules.__all__
    if hasattr(getattr(rules, name), "decide_batch") and name != "Rule"
}
TREES = {
    "chain": Chain(3),
    **{law.name: Widths((3, 2), law) for law in (Law.IID, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP)},
    "dynamic": Dynamic(6, 3, 2),
}
TEXTS = [torch.tensor([b % 4, b // 4]) for b in range(6)]  # they end at different steps


def recorded(tree="SAMPLED_THEN_TOP", rule="SiblingRejection", temperature=1.0, level="laws", **options):
    drafter = TabularDrafter(Table(12, 4), TREES[tree])
    options = {"sampling": Sampling(temperature), "max_new_tokens": 12, "stop_tokens": (3,), "seed": 7, **options}
    return generate(TabularTarget(12, 3), TEXTS, drafter, rule=RULES[rule], trace=level, **options)


def counts(found):
    return [(step.nodes, step.emitted, step.accepted, step.tried) for step in found.steps]


def same_decisions(a, b):
    pairs = [(x.record.decisions, y.record.decisions) for x, y in zip(a.steps, b.steps, strict=True)]
    return all(torch.equal(vars(x)[name], vars(y)[name]) for x, y in pairs for name in ("path", "accepted", "token"))


def admitted(rule, tree, temperature):
    with suppress(ValueError):
        RULES[rule].check(TabularDrafter(Table(12, 4), TREES[tree]).spec(Sampling(temperature)))
        return True


def test_what_follows_the_last_stage_is_time_of_the_step(monkeypatch):
    note = Batch.note

    def slowly(self, outcome):
        time.sleep(0.02)
        note(self, outcome)

    monkeypatch.setattr(Batch, "note", slowly)
    steps = generate(TabularTarget(12, 3), TEXTS[0], max_new_tokens=4, stop_tokens=()).trace.steps
    assert min(step.other_seconds for step in steps) >= 0.02


def test_the_prefill_lasts_until_the_device_has_done_it(monkeypatch):
    monkeypatch.setattr("specdec.loop.finish", lambda device: time.sleep(0.02))
    assert generate(TabularTarget(12, 3), TEXTS[0], max_new_tokens=1).trace.prefill_seconds >= 0.02


def test_the_prefill_begins_with_the_call(monkeypatch):
    def slowly(*arguments):
        time.sleep(0.02)
        return as_prompts(*arguments)

    monkeypatch.setattr("specdec.arguments.as_prompts", slowly)
    assert generate(TabularTarget(12, 3), TEXTS[0], max_new_tokens=1).trace.prefill_seconds >= 0.02


@pytest.mark.parametrize("rule, tree, temperature", [c for c in product(RULES, TREES, (0.0, 1.0)) if admitted(*c)])
def test_replay_by_the_recorded_rule_is_the_recording(rule, tree, temperature):
    found = recorded(tree, rule, temperature).trace
    again = trace.replay(found, RULES[rule])
    assert same_decisions(again, found) and counts(again) == counts(found)
    assert len({len(step.emitted) for step in found.steps}) == 1 and 0 in found.steps[-1].emitted  # some end early


@pytest.mark.parametrize("rule", RULES)
def test_replay_decides_as_the_rule_does_in_a_run_of_its_own(rule):
    """The first step begins at the same place in both."""
    tree = "IID" if rule in ("KSeq", "LevelVerification") else "chain" if rule == "BlockVerification" else "dynamic"
    for seed in range(2):
        replayed = trace.replay(recorded(tree, seed=seed).trace, RULES[rule])
        own = recorded(tree, rule, seed=seed).trace
        assert counts(replayed)[0] == counts(own)[0]


def test_another_rule_decides_otherwise():
    found = recorded("IID").trace
    replayed = trace.replay(found, RULES["TraversalVerification"])
    assert not same_decisions(replayed, found) and counts(replayed) != counts(found)
    assert replayed.summary()["decode_seconds"] == 0


def test_other_coins_decide_otherwise():
    """What replay certifies would pass if it copied the recorded decisions: here it must not reproduce them."""

    class Other(rules.SiblingRejection):
        def decide_batch(self, tree, target_law, coins):
            coins.advance()
            return super().decide_batch(tree, target_law, coins)

    found = recorded().trace
    assert not same_decisions(trace.replay(found, Other()), found)


@pytest.mark.parametrize("level", trace.LEVELS)
def test_a_file_gives_back_the_trace(level, tmp_path):
    found = recorded(level=level).trace
    found.save(tmp_path / "run.safetensors")
    loaded = trace.load(tmp_path / "run.safetensors")
    assert loaded.summary() == found.summary() and counts(loaded) == counts(found)
    assert [step.visits for step in loaded.steps] == [step.visits for step in found.steps]
    if level == "laws":
        assert same_decisions(trace.replay(loaded, RULES["SiblingRejection"]), found)
        for x, y in zip(loaded.steps, found.steps, strict=True):
            assert torch.equal(x.record.target.tensor(), y.record.target.tensor())
            assert x.record.draft is y.record.draft is None or torch.equal(
                x.record.draft.tensor(), y.record.draft.tensor()
            )
            assert x.record.spec == y.record.spec


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a file that Trace"):
        trace.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("level", ["ceiling", "laws"])
def test_recording_changes_no_text(level):
    plain, out = recorded(level="summary"), recorded(level=level)
    assert all(map(torch.equal, plain.tokens, out.tokens)) and counts(plain.trace) == counts(out.trace)


def test_runs_by_graphs_can_be_recorded():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some stages run step by step
        found = recorded(engine="graph")
    assert all(map(torch.equal, found.tokens, recorded().tokens))
    assert same_decisions(trace.replay(found.trace, RULES["SiblingRejection"]), found.trace)


def test_decisions_are_those_that_became_text():
    out = recorded()
    texts = [[] for _ in TEXTS]
    for step in out.trace.steps:
        tree, decided = step.record.tree(), step.record.decisions
        for b, count in enumerate(step.emitted):
            path = decided.path[b, 1 : 1 + decided.accepted[b]]
            texts[b] += [*tree.tokens[b, path].tolist(), int(decided.token[b])][:count]
    assert texts == [row.tolist() for row in out.tokens]


@pytest.mark.parametrize("drafter", [ModelDrafter(llama(1), Widths((2, 2))), NgramDrafter(3), None], ids=str)
def test_laws_are_those_of_the_text_that_processors_read(drafter):
    """A real model and its cache; a law after another text would decide otherwise."""
    config = GenerationConfig(do_sample=True, repetition_penalty=1.5, top_k=8, eos_token_id=7, pad_token_id=0)
    sampling = Sampling.from_generation_config(config)
    found = generate(llama(), PROMPTS, drafter, sampling=sampling, max_new_tokens=16, trace="laws").trace
    assert same_decisions(trace.replay(found, RULES["SiblingRejection"]), found)
    assert max((step.record.target.tensor() > 0).sum(-1).max() for step in found.steps) == 8
    assert all(step.record.target.where is not None for step in found.steps)  # sparse


def test_a_law_that_nobody_visits_need_not_be_one():
    class Broken(TabularTarget):
        def score(self, tree, context):
            logits = super().score(tree, context)
            logits[:, 1:] = torch.nan
            return logits

    class Wrong(TabularDrafter):
        """Drafts a token that greedy decoding never accepts."""

        def propose(self, context, coins):
            tree = super().propose(context, coins)
            tree.tokens[:, 1:] = (TabularTarget(12, 3).score(tree, context)[:, :1].argmin(-1)).expand(-1, 1)
            return tree

    out = generate(Broken(12, 3), TEXTS, Wrong(Table(12, 4), Chain(1)), max_new_tokens=4, stop_tokens=(), trace="laws")
    assert out.trace.steps[0].accepted == [0] * len(TEXTS)


def test_a_rule_that_the_trees_do_not_admit_is_refused():
    with pytest.raises(ValueError, match="KSeq"):
        trace.replay(recorded("SAMPLED_THEN_TOP").trace, RULES["KSeq"])


def test_a_trace_without_laws_cannot_be_replayed():
    with pytest.raises(ValueError, match='record the run with trace="laws"'):
        trace.replay(recorded(level="summary").trace, RULES["SiblingRejection"])


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.9], ids=["nothing", "few", "most"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_packing_is_exact_and_no_larger_than_the_tensor(kept, dtype):
    tensor = torch.rand(3, 4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensor = torch.where(tensor < kept, tensor, 0).to(dtype)
    packed = Packed.of(tensor)
    assert torch.equal(packed.tensor(), tensor) and packed.tensor().dtype == dtype
    assert sum(part.nbytes for part in (packed.values, packed.where) if part is not None) <= tensor.nbytes
    assert (packed.where is None) == (kept == 0.9)
