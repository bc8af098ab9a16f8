"""The last texts move to fewer rows, and a few long texts do not size the rows of all others."""

import numpy as np
import pytest
import torch
from captured import DRAFT, DRAFTERS, TARGET
from many_texts import MANY, PROCESSED, SAMPLED, texts

import specdec
from specdec import Sampling
from specdec import slots as slots_module
from specdec.arguments import as_request
from specdec.drafters import ModelDrafter
from specdec.loop import Decoding
from specdec.request import Text
from specdec.slots import groups
from specdec.trees import Chain

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "name", ["none", "chain", "dynamic", "heads", "layers left out", "suffixes, then a model", "n-grams"]
)
def test_the_last_texts_move_to_fewer_rows(name):
    prompts, budgets = [prompt[:12] for prompt in MANY], [2, 20, 3, 2, 3, 9, 2, 2, 3, 3, 2]
    options = {**SAMPLED, "max_new_tokens": budgets, "stop_tokens": ()}
    out = specdec.generate(TARGET, prompts, DRAFTERS[name](DRAFT), batch_size=8, **options)
    assert [text.tolist() for text in out.tokens] == texts(prompts, DRAFTERS[name](DRAFT), **options)
    rows = [len(step.held) for step in out.trace.steps]
    assert rows[0] == 8 and rows[-1] == 1 and rows == sorted(rows, reverse=True)
    assert sum(sum(step.emitted) for step in out.trace.steps) == sum(budgets)


def test_a_smaller_batch_that_finds_no_room_is_done_without(monkeypatch):
    prompts, budgets = [prompt[:12] for prompt in MANY], [2, 20, 3, 2, 3, 9, 2, 2, 3, 3, 2]
    options = {**SAMPLED, "max_new_tokens": budgets, "stop_tokens": ()}
    expected, rooms = texts(prompts, **options), iter([1 << 40])
    monkeypatch.setattr("specdec.models.memory.free_memory", lambda device: next(rooms, 1))
    with pytest.warns(UserWarning, match="The last texts are decoded in a batch of 8: Keys and values of 4 texts"):
        out = specdec.generate(TARGET, prompts, batch_size=8, **options)
    assert [text.tolist() for text in out.tokens] == expected
    assert {len(step.held) for step in out.trace.steps} == {8}


def test_what_a_step_gained_is_the_mean_of_all_while_texts_wait_and_then_that_of_the_longest():
    options = {"max_new_tokens": [3, 6, 5], "stop_tokens": (), "batch_size": 2}
    request = as_request(TARGET, [[1], [2], [3]], ModelDrafter(TARGET, Chain(1)), **options)
    with Decoding(request) as run:
        gained = [(run.batch.waiting, run.batch.gained, *map(len, outcome.emitted)) for outcome in run.steps()]
    # the draft is the target itself, so every step gives two tokens, but for the last of an uneven budget
    assert gained == [(True, 2, 2, 2), (True, 2, 2, 2), (True, 1.5, 2, 1), (False, 2, 2, 0), (False, 1, 1)]


def test_processors_keep_their_state_in_fewer_rows():
    options = {"sampling": PROCESSED["state"], "stop_tokens": (), "max_new_tokens": [2, 20, 3, 2, 3, 9, 2, 2, 3, 3, 2]}
    prompts, drafter = [prompt[:12] for prompt in MANY], DRAFTERS["chain"](DRAFT)
    assert texts(prompts, drafter, batch_size=8, **options) == texts(prompts, drafter, **options)


GROUPS = {
    "as none is long": ([10, 9, 8, 10], 2, [[0, 1, 2, 3]]),
    "all at once": ([1000, 1, 1], None, [[0, 1, 2]]),
    "one long among short ones": ([10, 1000, 11, 12, 10], 2, [[1], [0, 2, 3, 4]]),
    "one row, which costs the same": ([10, 1000, 11], 1, [[0, 1, 2]]),
    "so few that no memory is saved": ([1000, 600, 600], 4, [[0, 1, 2]]),
    "three sizes": ([10] * 8 + [100] + [1000], 8, [[9], [8], [*range(8)]]),
    "many long ones": ([1000, 1000, 1000, 10, 10], 2, [[0, 1, 2, 3, 4]]),
}


@pytest.mark.parametrize("case", GROUPS)
def test_a_few_long_texts_do_not_size_the_rows_of_all_others(case, monkeypatch):
    monkeypatch.setattr(slots_module, "_SHORT", 1)
    lengths, slots, expected = GROUPS[case]
    texts = [Text(i, np.zeros(length - 1, np.int64), length - 1, 1, i) for i, length in enumerate(lengths)]
    assert [[text.index for text in group] for group in groups(texts, slots)] == expected


def test_texts_of_a_thousand_tokens_are_decoded_together_with_any_shorter_ones():
    for longest, expected in (1024, [[1, 0, 2]]), (2048, [[1], [0, 2]]):
        texts = [Text(i, np.zeros(4, np.int64), 4, left, i) for i, left in enumerate([6, longest - 4, 6])]
        assert [[text.index for text in group] for group in groups(texts, 2)] == expected


def test_the_largest_budgets_come_first():
    texts = [Text(i, np.zeros(20 - left, np.int64), 20 - left, left, i) for i, left in enumerate([3, 7, 7, 9])]
    assert [text.index for text in groups(texts, 2)[0]] == [3, 1, 2, 0]


def test_groups_have_rows_of_their_own_size(monkeypatch):
    monkeypatch.setattr(slots_module, "_SHORT", 1)
    prompts = [[1] * 100, *MANY[:5]]
    request = as_request(TARGET, prompts, DRAFTERS["chain"](DRAFT), batch_size=4, max_new_tokens=6, stop_tokens=())
    capacities = []
    with Decoding(request) as run:
        for _ in run.steps():
            capacities.append((len(run.batch), run.batch.capacity))
        assert run.emitted == texts(prompts, max_new_tokens=6, stop_tokens=(), sampling=Sampling())
    # four slots for drafts
    assert capacities[0] == (1, 110) and max(capacities[-8:]) == (4, 22)


def test_the_memory_of_a_larger_batch_is_free_once_its_last_texts_have_moved(caches):
    options = {**SAMPLED, "max_new_tokens": [12, 3, 3, 2, 2, 2], "stop_tokens": ()}
    request = as_request(TARGET, [[i] for i in range(6)], DRAFTERS["chain"](DRAFT), batch_size=4, **options)
    with Decoding(request) as run:
        for _ in run.steps():
            if len(run.held) < 4:
                assert [len(found.lengths) for cache in caches if (found := cache())] == [len(run.held)] * 2
    assert len(caches) >= 4
