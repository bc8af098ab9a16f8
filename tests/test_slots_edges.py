"""Slots at their edges: texts of one token, traces, full contexts, faults."""

import pytest
import torch
from captured import DRAFT, DRAFTERS, TARGET
from many_texts import BUDGETS, MANY, SAMPLED, texts
from tiny_models import llama

import specdec
from specdec.arguments import as_request
from specdec.display.text import authors
from specdec.drafters import ModelDrafter
from specdec.loop import Decoding
from specdec.rules import BlockVerification
from specdec.testing import TabularTarget
from specdec.trace import replay

torch.set_num_threads(1)


def test_all_texts_may_end_at_their_first_token():
    assert texts(batch_size=3, max_new_tokens=1) == [text[:1] for text in texts(max_new_tokens=4)]
    everything = {"stop_tokens": range(50), "max_new_tokens": 9}
    for name in ("none", "chain", "heads"):
        found = texts(drafter=DRAFTERS[name](DRAFT), batch_size=3, **everything)
        assert list(map(len, found)) == [1] * len(MANY)
        assert found == texts(drafter=DRAFTERS[name](DRAFT), **everything)


@pytest.mark.parametrize("rule", [BlockVerification(), None], ids=["block", "the same"])
def test_laws_that_were_recorded_in_slots_are_replayed(rule, tmp_path):
    options = {**SAMPLED, "max_new_tokens": BUDGETS, "trace": "laws", "batch_size": 3}
    out = specdec.generate(TARGET, MANY, DRAFTERS["chain"](DRAFT), first_index=4, **options)
    out.trace.save(tmp_path / "trace")
    trace = specdec.trace.load(tmp_path / "trace")
    assert trace.summary() == out.summary() and [step.held for step in trace.steps] == [
        step.held for step in out.trace.steps
    ]
    again = replay(trace, specdec.rules.SiblingRejection() if rule is None else rule)
    if rule is None:
        assert [step.emitted for step in again.steps] == [step.emitted for step in out.trace.steps]
    assert [step.held for step in again.steps] == [step.held for step in out.trace.steps]


def test_ceilings_in_slots_are_those_of_all_at_once():
    found = [
        specdec.generate(
            TARGET, MANY, DRAFTERS["chain"](DRAFT), batch_size=n, trace="ceiling", max_new_tokens=BUDGETS, **SAMPLED
        ).summary()
        for n in (None, 3)
    ]
    for figure in ("ceiling_share", "divergence", "acceptance_length"):
        assert found[1][figure] == pytest.approx(found[0][figure], abs=1e-9)


def test_a_text_may_fill_the_context_in_a_used_row():
    model = llama(max_position_embeddings=24)
    prompts = [[1, 2, 3], [4], [*range(2, 20)], [5]]
    budgets = [24 - len(prompt) for prompt in prompts]
    options = {"target": model, "max_new_tokens": budgets, "stop_tokens": ()}
    for name in ("none", "sampled, then top", "layers left out"):
        drafter = DRAFTERS[name](llama(1, num_hidden_layers=1, max_position_embeddings=24))
        assert texts(prompts, drafter, batch_size=2, **options) == texts(prompts, drafter, **options)


@pytest.mark.parametrize("with_", [{"keep": True}, {"resume": "a generation"}], ids=str)
def test_slots_are_refused_where_caches_are_to_be_kept(with_):
    if "resume" in with_:
        with_ = {"resume": specdec.generate(TARGET, MANY, max_new_tokens=1, keep=True)}
    with pytest.raises(ValueError, match="batch_size=2 with"):
        texts(batch_size=2, **with_)


def test_a_fault_is_told_of_the_text_not_of_its_row():
    class Broken(TabularTarget):
        def logits(self, text):
            return super().logits(text) * (torch.nan if text[0] == 4 else 1)

    for batch_size in (None, 1, 2):
        with pytest.raises(ValueError, match=r"text\(s\) \[3\]"):
            texts([[1], [2], [3], [4], [0]], target=Broken(5), stop_tokens=(), max_new_tokens=3, batch_size=batch_size)


def test_what_lies_in_ended_rows_and_behind_their_texts_is_never_seen():
    request = as_request(TARGET, MANY, ModelDrafter(DRAFT), batch_size=3, max_new_tokens=BUDGETS, **SAMPLED)
    with Decoding(request) as run:
        while not run.finished:
            run.step()
            with torch.inference_mode():
                for cached in (run.runs.target.cached, run.runs.drafter.cached):
                    for row, left in enumerate(run.batch.host_left):
                        behind = int(cached.cache.lengths[row]) if left else 0
                        for stack in cached.cache._stacks.values():
                            stack[:, row, behind:] = 1e3 if left else torch.nan
                        if not left:
                            cached._held.forget([row])
        assert run.emitted == texts(drafter=ModelDrafter(DRAFT))


def test_a_text_is_coloured_by_who_wrote_it_in_whichever_row():
    out = specdec.generate(TARGET, MANY, DRAFTERS["chain"](DRAFT), batch_size=3, max_new_tokens=BUDGETS, **SAMPLED)
    assert [len(authors(out.trace)[index]) for index in range(len(MANY))] == [len(text) for text in out.tokens]
    assert f"text 10: {len(out.tokens[10])} tokens" in out._repr_html_()
