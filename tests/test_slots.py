"""Rows of a batch are slots: whichever row a text is in, after whichever other text, it is the text of a call of its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from captured import DRAFT, DRAFTERS, TARGET
from many_texts import BUDGETS, MANY, PROCESSED, SAMPLED, SHARED, WITHOUT_NEIGHBOURS, alone, texts
from transformers import GenerationConfig

import specdec
from specdec import Sampling
from specdec.arguments import as_request
from specdec.display.text import authors
from specdec.drafters import NgramDrafter
from specdec.loop import Decoding
from specdec.rules import BlockVerification, TraversalVerification
from specdec.testing import Tape

torch.set_num_threads(1)


@pytest.mark.parametrize("name", WITHOUT_NEIGHBOURS)
def test_texts_do_not_depend_on_how_many_are_at_work(name):
    for batch_size in (None, 1, 3, 8, 50):
        assert texts(drafter=DRAFTERS[name](DRAFT), batch_size=batch_size) == alone(name), batch_size


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name not in WITHOUT_NEIGHBOURS])
def test_greedy_texts_do_not_depend_on_the_pauses_of_a_draft(name):
    for batch_size in (1, 3, 8):
        found = texts(drafter=DRAFTERS[name](DRAFT), batch_size=batch_size, sampling=Sampling())
        assert found == alone("none", sampling=Sampling()), batch_size


@pytest.mark.filterwarnings("ignore:engine. the stage .* runs step by step")
@pytest.mark.parametrize("name", ["none", "chain", "sampled, then top", "static", "layers left out", "heads"])
def test_an_engine_captures_once_for_all_that_enters_and_for_the_next_call(name):
    engine, drafter, target = specdec.Graphs(capture=Tape), DRAFTERS[name](DRAFT), specdec.ModelTarget(TARGET)
    captured = []
    for _ in range(2):
        assert texts(drafter=drafter, target=target, batch_size=4, engine=engine) == alone(name)
        captured.append(engine.captured)
    assert captured[0] == captured[1] > 0


@pytest.mark.parametrize("rule", [BlockVerification(), TraversalVerification()], ids=lambda rule: type(rule).__name__)
def test_other_rules_give_each_text_as_alone(rule):
    name = "chain" if isinstance(rule, BlockVerification) else "independent children"
    assert texts(drafter=DRAFTERS[name](DRAFT), batch_size=3, rule=rule) == alone(name, rule=rule)


@pytest.mark.parametrize(
    "order",
    [range(len(MANY)), range(len(MANY))[::-1], np.random.default_rng(0).permutation(len(MANY))],
    ids=["as given", "reversed", "shuffled"],
)
def test_greedy_texts_do_not_depend_on_the_order_of_prompts(order):
    found = texts(
        [MANY[i] for i in order],
        DRAFTERS["chain"](DRAFT),
        batch_size=3,
        sampling=Sampling(),
        max_new_tokens=[BUDGETS[i] for i in order],
    )
    expected = alone("none", sampling=Sampling())
    assert found == [expected[i] for i in order]


@pytest.mark.parametrize("sampling", PROCESSED)
def test_processors_follow_their_own_text_from_row_to_row(sampling):
    options = {"sampling": PROCESSED[sampling], "stop_tokens": None}
    expected = alone("chain", **options)
    for batch_size in (2, 4):
        assert texts(drafter=DRAFTERS["chain"](DRAFT), batch_size=batch_size, **options) == expected


def test_a_stop_string_ends_a_text_in_any_row():
    pair, config = (
        specdec.demo.load(),
        GenerationConfig(do_sample=False, stop_strings=["\n", " the"], eos_token_id=None),
    )
    prompts, drafter = [prompt.text[:40] for prompt in pair.prompts[:5]], NgramDrafter()
    options = {"target": pair.target, "drafter": drafter, "tokenizer": pair.tokenizer, "max_new_tokens": 16}
    options["sampling"] = Sampling.from_generation_config(config)
    expected = [texts(prompt, **options)[0] for prompt in prompts]
    assert min(map(len, expected)) < 16
    for batch_size in (1, 3):
        assert texts(prompts, batch_size=batch_size, **options) == expected
        parts = [[] for _ in prompts]
        for index, new in specdec.stream(prompts=prompts, batch_size=batch_size, **options):
            parts[index] += new.tolist()
        assert parts == expected


class FourBack:
    """Ends texts that have eight tokens or more four tokens before."""

    def ask(self, run):
        for row, index in enumerate(run.held):
            if index >= 0 and run.running[row] and len(run.tokens(index)) >= 8:
                run.end(index, len(run.tokens(index)) - 4)


@pytest.mark.parametrize("batch_size", [1, 3, 8, None])
def test_a_text_may_be_cut_in_earlier_steps_than_the_last(batch_size):
    options = {**SAMPLED, "max_new_tokens": [20, 3, 19, 18, 2, 17, 2]}
    prompts = [prompt[:12] for prompt in MANY[:7]]
    whole = texts(prompts, max_new_tokens=options["max_new_tokens"])
    request = as_request(TARGET, prompts, batch_size=batch_size, **options)
    with Decoding(replace(request, stopping=FourBack())) as run:
        for _ in run.steps():
            pass
        assert run.emitted == [text[:4] if len(text) >= 8 else text for text in whole]
        assert {i: text.tokens.tolist() for i, text in run.slots.written.items()} == dict(enumerate(run.emitted))
        assert [len(authors(run.trace)[index]) for index in range(len(prompts))] == [len(text) for text in run.emitted]


@pytest.mark.parametrize("name", WITHOUT_NEIGHBOURS)
def test_drafts_are_those_of_a_text_of_its_own(name):
    def history(trace, index):
        """(emitted, accepted, tried) of each step of a text."""
        rows = [(step, step.held.index(index)) for step in trace.steps if index in step.held]
        return [(step.emitted[row], step.accepted[row], step.tried[row]) for step, row in rows if step.emitted[row]]

    options = {**SAMPLED, "sampling": Sampling(0.3)}
    expected = [
        history(
            specdec.generate(TARGET, MANY[i], DRAFTERS[name](DRAFT), first_index=i, max_new_tokens=12, **options).trace,
            0,
        )
        for i in range(5, 11)
    ]
    for size in (1, 4):
        drafter = DRAFTERS[name](DRAFT)
        out = specdec.generate(TARGET, MANY[5:], drafter, first_index=5, max_new_tokens=12, batch_size=size, **options)
        assert [history(out.trace, index) for index in range(6)] == expected


def test_log_probabilities_are_those_of_their_own_text():
    options = {**SAMPLED, "max_new_tokens": BUDGETS, "logprobs": True}
    expected, found = (
        specdec.generate(TARGET, MANY, DRAFTERS["chain"](DRAFT), batch_size=n, **options) for n in (None, 3)
    )
    for a, b in ((expected.logprobs, found.logprobs), (expected.raw_logprobs, found.raw_logprobs)):
        assert [len(x) for x in b] == [len(text) for text in found.tokens]
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True))


# Samples of a prompt


def test_a_sample_does_not_depend_on_how_many_are_asked_for():
    drafter = DRAFTERS["sampled, then top"](DRAFT)
    few, many = (texts(MANY[:4], drafter, num_samples=n, batch_size=3, max_new_tokens=8) for n in (2, 5))
    assert [many[5 * i + j] for i in range(4) for j in range(2)] == few
    assert texts(MANY[:4], drafter, max_new_tokens=8) == many[::5]
    assert texts(MANY[2:4], drafter, num_samples=5, first_index=2, max_new_tokens=8) == many[10:]


def test_no_two_texts_share_their_coins():
    request = as_request(
        TARGET, MANY, num_samples=3, batch_size=4, max_new_tokens=2, first_index=5, **{**SAMPLED, "stop_tokens": ()}
    )
    assert len({text.key for text in request.texts}) == 3 * len(MANY)
    with Decoding(request) as run:
        seen = set()
        while not run.finished:
            run.step()
            coins = run.runs.coins
            # steps have gone on by one
            used = [(coins.keys[row], coins.steps[row]) for row, n in enumerate(run.trace.steps[-1].emitted) if n]
            assert not seen & {*used} and len({*used}) == len(used)
            seen.update(used)
    assert len(seen) == 2 * 3 * len(MANY)


def test_samples_of_one_prompt_differ():
    assert len({*map(tuple, texts([SHARED], num_samples=6, batch_size=2, max_new_tokens=12, stop_tokens=()))}) == 6
