"""Interrupts at any point of a run in slots: what has been written stands, and going on from it gives the very same texts."""

import contextlib
import threading
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from captured import DRAFT, DRAFTERS, TARGET
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from

import specdec
from specdec import Sampling, runs
from specdec.arguments import as_request
from specdec.batch import Batch
from specdec.coins import Coins
from specdec.loop import Decoding
from specdec.models.cache import TreeCache
from specdec.models.cached_model import CachedModel
from specdec.models.target import ModelTargetRun
from specdec.testing import Tape

torch.set_num_threads(1)
SHARED = [t % 47 for t in range(3, 43)]
PROMPTS = [[1, 2, 3, 4, 5], [9], [*range(30, 42)], [3, 4, 3, 4, 3], [*SHARED, 5], [*SHARED, 6, 8], [9, 9]]
BUDGETS = [12, 6, 1, 8, 5, 9, 7]
OPTIONS = {"sampling": Sampling(1.0), "seed": 3, "stop_tokens": (7, 11), "max_new_tokens": BUDGETS}
NAMES = ["none", "chain", "sampled, then top", "heads", "layers left out", "suffixes, then a model"]
# Wherever a run calls one of these, it may be stopped.
PLACES = {
    "reading": (CachedModel, "read"),
    "taking slots": (TreeCache, "take"),
    "score": (ModelTargetRun, "score"),
    "keeping slots": (TreeCache, "keep"),
    "texts, when a row is filled": (Batch, "enter"),
    "texts, on the device": (Batch, "append"),
    "texts, on the host": (Batch, "note"),
    "coins, when a row is filled": (Coins, "enter"),
    "coins": (Coins, "advance"),
    "a smaller batch": (runs, "moved"),
    "a forward pass": (CachedModel, "forward"),
}
WHOLE = {
    name: [text.tolist() for text in specdec.generate(TARGET, PROMPTS, DRAFTERS[name](DRAFT), **OPTIONS).tokens]
    for name in NAMES
}


def stopping(place, at, after):
    """A patch that interrupts a run at the `at`-th call of this place, before or after it."""
    owner, name = PLACES[place]
    found, calls = getattr(owner, name), []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == at and not after:
            raise KeyboardInterrupt
        result = found(*args, **kwargs)
        if len(calls) == at:
            raise KeyboardInterrupt
        return result

    return patch.object(owner, name, stopped)


def going_on(text, written):
    """The rest of a text."""
    if text.index not in written:
        return text
    tokens, step = written[text.index].tokens, written[text.index].steps
    return replace(text, tokens=np.concatenate([text.tokens, tokens]), left=text.left - len(tokens), step=step)


SIZES = integers(1, 4)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(sampled_from(NAMES), sampled_from([*PLACES]), integers(1, 40), sampled_from([False, True]), SIZES, SIZES)
def test_going_on_after_an_interrupt_gives_the_very_same_texts(name, place, at, after, slots, later_slots):
    drafter, run = DRAFTERS[name](DRAFT), None
    request = as_request(TARGET, PROMPTS, drafter, batch_size=slots, **OPTIONS)
    with patch("specdec.slots._CHUNK", 8):
        with contextlib.suppress(KeyboardInterrupt), stopping(place, at, after), Decoding(request) as run:
            with contextlib.suppress(KeyboardInterrupt):
                for _ in run.steps():
                    pass
            # those that the last step gave may not have been written yet
            assert all(whole[: len(text)] == text for text, whole in zip(run.emitted, WHOLE[name], strict=True))
        written = {} if run is None else run.slots.written
        for index, text in written.items():
            whole, count = WHOLE[name][index], len(text.tokens)
            assert text.tokens.tolist() == whole[:count] and 0 < text.steps <= count
            assert text.ended == (count == len(whole))
        found = {index: text.tokens.tolist() for index, text in written.items()}
        rest = [
            going_on(text, written)
            for text in request.texts
            if text.index not in written or not written[text.index].ended
        ]
        if rest:
            with Decoding(replace(request, slots=later_slots, texts=rest)) as run:
                for _ in run.steps():
                    pass
                found |= {text.index: run.tokens(text.index) for text in rest}
    assert [found[index] for index in range(len(PROMPTS))] == WHOLE[name]


@pytest.mark.filterwarnings("ignore:engine. the stage .* runs step by step")
@pytest.mark.parametrize("place", PLACES)
def test_parts_of_a_run_that_was_stopped_serve_the_next_one(place):
    engine, target, drafter = specdec.Graphs(capture=Tape), specdec.ModelTarget(TARGET), DRAFTERS["chain"](DRAFT)
    for at in (1, 5, 9):
        with stopping(place, at, False), contextlib.suppress(KeyboardInterrupt):
            specdec.generate(target, PROMPTS, drafter, batch_size=4, engine=engine, **OPTIONS)
        found = specdec.generate(target, PROMPTS, drafter, batch_size=4, engine=engine, **OPTIONS).tokens
        assert [text.tolist() for text in found] == WHOLE["chain"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("at", [2, 7, 13, 21])
def test_a_stream_that_was_stopped_has_the_texts_that_it_gave(place, at):
    parts = [[] for _ in PROMPTS]
    stream = specdec.stream(TARGET, PROMPTS, DRAFTERS["chain"](DRAFT), batch_size=4, **OPTIONS)
    with contextlib.suppress(KeyboardInterrupt), stopping(place, at, True):
        for index, new in stream:
            parts[index] += new.tolist()
    assert [text.tolist() for text in stream.generation.tokens] == parts


def test_a_failure_at_the_next_group_leaves_the_texts_of_the_first(monkeypatch):
    monkeypatch.setattr("specdec.slots._SHORT", 1)
    prompts, options = [[1] * 200, [2, 3], [4], [5, 6]], {**OPTIONS, "max_new_tokens": 4, "stop_tokens": ()}
    begun, start = [], runs.start

    def failing(*args):
        begun.append(1)
        if len(begun) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return start(*args)

    stream = specdec.stream(TARGET, prompts, batch_size=2, **options)
    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(runs, "start", failing)
        for _ in stream:
            pass
    assert [len(text) for text in stream.generation.tokens] == [4, 0, 0, 0]
    found = specdec.generate(TARGET, prompts, batch_size=2, **options).tokens
    assert torch.equal(found[0], stream.generation.tokens[0])


def test_threads_that_share_all_parts_do_not_meet():
    engine, target, drafter = specdec.Graphs(), specdec.ModelTarget(TARGET), DRAFTERS["chain"](DRAFT)
    found = {}

    def work(i):
        texts = specdec.generate(target, PROMPTS, drafter, batch_size=2 + i % 2, engine=engine, **OPTIONS).tokens
        found[i] = [text.tolist() for text in texts]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), WHOLE["chain"])
