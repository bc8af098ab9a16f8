"""Prompts that are read while rows go on: what they share is copied, and long ones are read in parts."""

import pytest
import torch
from captured import DRAFT, DRAFTERS, TARGET
from many_texts import SAMPLED, SHARED, texts

from specdec import Sampling
from specdec import slots as slots_module
from specdec.arguments import as_request
from specdec.drafters import ModelDrafter
from specdec.loop import Decoding

torch.set_num_threads(1)


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_a_beginning_is_read_once_and_copied(batch_size):
    prompts = [[*SHARED, i] for i in range(6)]
    request = as_request(TARGET, prompts, ModelDrafter(DRAFT), batch_size=batch_size, max_new_tokens=2, stop_tokens=())
    with Decoding(request) as run:
        begun = run.runs
        for _ in run.steps():
            pass
        for cached in (begun.target.cached, begun.drafter.cached):
            assert (cached.tokens_read, cached.tokens_copied) == (len(SHARED), 5 * len(SHARED))
        assert run.emitted == texts(prompts, max_new_tokens=2, stop_tokens=(), sampling=Sampling())


@pytest.mark.parametrize("name", ["none", "chain", "heads", "layers left out"])
def test_samples_that_enter_in_one_step_copy_from_each_other(name):
    options = {**SAMPLED, "num_samples": 4, "max_new_tokens": 4, "stop_tokens": ()}
    prompts = [SHARED[:1], [*SHARED, 2], SHARED]
    request = as_request(TARGET, prompts, DRAFTERS[name](DRAFT), batch_size=4, **options)
    with Decoding(request) as run:
        begun = run.runs
        for _ in run.steps():
            pass
        cached = begun.target.cached
        every = 4 * sum(len(prompt) - 1 for prompt in prompts)
        assert cached.tokens_read + cached.tokens_copied == every
        # A state is noted of the last token before the root, which is therefore read in each row.
        assert cached.tokens_read <= len(SHARED) + (7 if name == "heads" else 0)
        assert run.emitted == texts(prompts, DRAFTERS[name](DRAFT), **options)


def test_a_later_turn_copies_what_was_said_and_answered():
    said = [[1, 2, 3, 4], [9, 8]]
    options = {"max_new_tokens": 6, "stop_tokens": (), "sampling": Sampling()}
    later = [[*prompt, *answer, 5] for prompt, answer in zip(said, texts(said, **options), strict=True)]
    # turns of one length are read in the prompts' order
    request = as_request(TARGET, [said[0], later[0], said[1], later[1]], batch_size=1, **options)
    with Decoding(request) as run:
        for _ in run.steps():
            pass
        cached = run.runs.target.cached
        # the last token of a text has not been read
        assert (cached.tokens_read, cached.tokens_copied) == (3 + 1 + 1 + 1, 9 + 7)
        assert run.emitted == texts([said[0], later[0], said[1], later[1]], **options)


@pytest.mark.parametrize("name", ["none", "chain", "heads", "suffixes, then a model", "layers left out"])
@pytest.mark.parametrize("others_end", [False, True])
def test_a_long_newcomer_is_read_in_chunks_between_steps(name, others_end, monkeypatch):
    monkeypatch.setattr(slots_module, "_CHUNK", 4)
    # the two with the largest budgets come first
    prompts, budgets = [[5, 6] * 15, [1, 2, 3], SHARED, [9]], [12 if others_end else 30, 6, 5, 2]
    request = as_request(TARGET, prompts, DRAFTERS[name](DRAFT), batch_size=2, max_new_tokens=budgets, stop_tokens=())
    with Decoding(request) as run:
        for _ in run.steps():
            pass
        assert run.emitted == texts(prompts, sampling=Sampling(), max_new_tokens=budgets, stop_tokens=())
        assert any(-1 in step.held for step in run.trace.steps)
