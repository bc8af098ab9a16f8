"""Rows of a batch are slots: whichever row a text is in, after whichever other text, it is the text of a call of its own."""

import weakref
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from captured import DRAFT, DRAFTERS, TARGET
from tiny_models import llama, state
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

import specdec
from specdec import Sampling
from specdec import slots as slots_module
from specdec.arguments import as_request
from specdec.display.text import authors
from specdec.drafters import Drafter, DraftRun, Fallback, ModelDrafter, NgramDrafter, Paused
from specdec.loop import Decoding
from specdec.models.cache import TreeCache
from specdec.models.target import Scores, Target, TargetRun
from specdec.request import Text
from specdec.rules import BlockVerification, TraversalVerification
from specdec.slots import groups
from specdec.testing import Table, TabularDrafter, TabularTarget, Tape
from specdec.trace import replay
from specdec.trees import Chain

torch.set_num_threads(1)
SHARED = [t % 47 for t in range(3, 43)]  # more tokens than a row waits for
MANY = [[1, 2, 3, 4, 5], [9], [*range(30, 42)], [3, 4, 3, 4, 3], [9], [*SHARED, 5], [*SHARED, 6, 8], SHARED, [1, 2, 3],
        [1, 2, 3, 4, 5], [*SHARED, 5, 11]]  # fmt: skip
BUDGETS = [3, 11, 1, 8, 5, 12, 2, 6, 9, 1, 7]
SAMPLED = {"sampling": Sampling(1.0), "seed": 3, "stop_tokens": (7, 11, 40)}
WITHOUT_NEIGHBOURS = [name for name in DRAFTERS if not name.endswith("paused")]


def texts(prompts=MANY, drafter=None, target=TARGET, **options):
    options = {"max_new_tokens": BUDGETS, **SAMPLED, **options}
    return [text.tolist() for text in specdec.generate(target, prompts, drafter, **options).tokens]


@lru_cache
def alone(name, **options):
    """The text of each prompt in a call of its own, by a drafter of this name."""
    return [
        texts([prompt], DRAFTERS[name](DRAFT), first_index=i, max_new_tokens=budget, **options)[0]
        for i, (prompt, budget) in enumerate(zip(MANY, BUDGETS, strict=True))
    ]


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


class Counting:
    """Logits processor with state: a token becomes likelier with every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, text, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % scores.shape[1]] += 5
        return scores


PROCESSED = {
    "state": Sampling(1.0, processors=(Counting(),)),
    "penalty": Sampling(1.0, processors=(RepetitionPenaltyLogitsProcessor(1.5),)),
    "config": Sampling.from_generation_config(
        GenerationConfig(do_sample=True, no_repeat_ngram_size=2, min_new_tokens=1, eos_token_id=[7, 11], top_k=20)
    ),
}


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


# Beginnings that prompts share


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


# Long prompts


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


# Halves and groups


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
    monkeypatch.setattr("specdec.models.cache.free_memory", lambda device: next(rooms, 1))
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


# Parts of one's own


class Own(Target):
    """A target that knows nothing of slots: it looks texts up in a table, as they were when it began."""

    def __init__(self, table):
        self.table, self.vocab, self.begun = table, table.vocab, 0

    def start(self, batch, states=(), last=None):
        self.begun += 1
        return OwnRun(self, batch)


class OwnRun(TargetRun):
    def __init__(self, target, batch):
        super().__init__(target, batch)
        self.texts = [text.tolist() for text in batch.texts]

    def score(self, tree):
        assert self.texts == [text.tolist() for text in self.batch.texts]
        rows = zip(self.texts, tree.tokens.tolist(), tree.topology.ancestors.tolist(), strict=True)
        paths = [
            [(*text[:-1], *(t for t, on in zip(row, line, strict=True) if on)) for line in reach]
            for text, row, reach in rows
        ]
        return Scores(torch.stack([torch.stack([self.target.table.logits(path) for path in row]) for row in paths]))

    def commit(self, outcome):
        for text, new in zip(self.texts, outcome.emitted, strict=True):
            text.extend(new)


@pytest.mark.parametrize(
    "drafter",
    [
        None,
        TabularDrafter(Table(5, 1), Chain(2)),
        NgramDrafter(2),
        Fallback(NgramDrafter(2), TabularDrafter(Table(5, 1), Chain(2))),
    ],
    ids=lambda drafter: type(drafter).__name__,
)
def test_a_target_that_knows_nothing_of_slots_is_begun_anew(drafter):
    prompts = [[1], [2, 3], [4, 4, 4], [1, 0], [3, 3]]
    target, table = Own(Table(5)), TabularTarget(5)
    options = {"stop_tokens": (4,), "max_new_tokens": [4, 9, 2, 5, 7]}
    assert texts(prompts, drafter, target, batch_size=2, **options) == texts(
        prompts, None if drafter is None else drafter, table, **options
    )
    assert target.begun > 1


class Stateful(Drafter):
    """Drafts what the target's last states say, and refuses to go on from states that it was not shown."""

    states = (-1, 0)

    def spec(self, sampling):
        return NgramDrafter(1).spec(sampling)

    def start(self, target, batch, last=None):
        return StatefulRun(self, batch)


class StatefulRun(DraftRun):
    def __init__(self, drafter, batch):
        super().__init__(drafter, batch)
        self.inner = NgramDrafter(1).start(None, batch)
        self.read_of = [0] * len(batch)

    def read(self, states, start, count):
        for row, (begin, n) in enumerate(zip(start.tolist(), count.tolist(), strict=True)):
            if n:
                assert begin <= self.read_of[row]
                self.read_of[row] = max(begin + n, self.read_of[row])

    def propose(self, coins):
        for row, length in enumerate(self.batch.host_lengths):
            assert self.read_of[row] == length - 1, row
        return self.inner.propose(coins)


def test_a_drafter_that_knows_nothing_of_slots_is_shown_the_states_of_all_rows_again():
    assert texts(drafter=Stateful(), batch_size=3, sampling=Sampling()) == alone("none", sampling=Sampling())


@pytest.mark.parametrize("inner", [NgramDrafter(2), Fallback(NgramDrafter(2), ModelDrafter(DRAFT))], ids=str)
def test_a_pause_outlives_the_texts_that_enter(inner):
    seen = []

    def seconds(nodes):
        seen.append(nodes)
        return 1.0 if nodes == 1 else 100.0

    # the first draft is too dear for the rest of the run
    drafter = Paused(inner, patience=0.5, share=0.01, seconds=seconds)
    texts([[3, 4] * 6] * 12, drafter, batch_size=1, max_new_tokens=[2, 3, 4] * 4, stop_tokens=())
    assert len([nodes for nodes in seen if nodes > 1]) == 1


# What is left behind


def test_models_are_left_as_they_were_found():
    draft = llama(1, num_hidden_layers=1)
    found = state(TARGET), state(draft)
    texts(drafter=ModelDrafter(draft), batch_size=3)
    for _ in specdec.stream(TARGET, MANY, ModelDrafter(draft), batch_size=3, max_new_tokens=BUDGETS):
        assert (state(TARGET), state(draft)) == found
    assert (state(TARGET), state(draft)) == found


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_a_stream_yields_every_token_once(batch_size):
    parts = [[] for _ in MANY]
    drafter = DRAFTERS["chain"](DRAFT)
    stream = specdec.stream(TARGET, MANY, drafter, batch_size=batch_size, max_new_tokens=BUDGETS, **SAMPLED)
    for index, new in stream:
        assert len(new) and new.dtype == torch.int64
        parts[index] += new.tolist()
    assert parts == alone("chain") == [text.tolist() for text in stream.generation.tokens]


@pytest.mark.parametrize("at", range(0, 60, 4))
def test_a_stream_that_is_closed_keeps_what_was_written(at):
    parts = [[] for _ in MANY]
    stream = specdec.stream(TARGET, MANY, batch_size=3, max_new_tokens=BUDGETS, **SAMPLED)
    for _, (index, new) in zip(range(at + 1), stream, strict=False):
        parts[index] += new.tolist()
    for _ in range(2):
        found = [text.tolist() for text in stream.generation.tokens]
        # the rest of the last step has been written too
        assert all(
            text[: len(part)] == part and len(text) <= len(part) + 1 for text, part in zip(found, parts, strict=True)
        )
        stream.close()


@pytest.mark.filterwarnings("ignore:engine. the stage .* runs step by step")
@pytest.mark.parametrize("engine", ["eager", "tape"])
def test_two_runs_that_share_all_parts_do_not_meet(engine):
    engine = specdec.Graphs(capture=Tape) if engine == "tape" else engine
    target, drafter = specdec.ModelTarget(TARGET), DRAFTERS["chain"](DRAFT)
    options = {"batch_size": 3, "max_new_tokens": BUDGETS, "engine": engine, **SAMPLED}
    streams = [specdec.stream(target, prompts, drafter, **options) for prompts in (MANY, MANY[::-1])]
    going = list(streams)
    while going:
        going = [stream for stream in going if next(stream, None) is not None]
    found = [[text.tolist() for text in stream.generation.tokens] for stream in streams]
    assert found == [alone("chain"), texts(MANY[::-1], drafter)]


def test_the_next_call_uses_weights_that_have_changed():
    model, draft, engine = llama(5), llama(6, num_hidden_layers=1), specdec.Graphs(capture=Tape)
    target, drafter = specdec.ModelTarget(model), ModelDrafter(draft)
    options = {"batch_size": 3, "engine": engine}
    before = texts(drafter=drafter, target=target, **options)
    for module, seed in ((model, 7), (draft, 8)):
        module.load_state_dict(llama(seed, num_hidden_layers=len(module.model.layers)).state_dict())
    after = texts(drafter=drafter, target=target, **options)
    assert before != after == texts(drafter=ModelDrafter(llama(8, num_hidden_layers=1)), target=llama(7))


# Odd cases


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
                            cached._texts[row] = cached._texts[row][:0]
        assert run.emitted == texts(drafter=ModelDrafter(DRAFT))


def test_a_text_is_coloured_by_who_wrote_it_in_whichever_row():
    out = specdec.generate(TARGET, MANY, DRAFTERS["chain"](DRAFT), batch_size=3, max_new_tokens=BUDGETS, **SAMPLED)
    assert [len(authors(out.trace)[index]) for index in range(len(MANY))] == [len(text) for text in out.tokens]
    assert f"text 10: {len(out.tokens[10])} tokens" in out._repr_html_()


def test_texts_that_have_ended_keep_no_buffers():
    budgets, options = [1000] + [1] * 39, {"batch_size": 2, "stop_tokens": (1, 2, 3, 4)}
    with Decoding(as_request(TabularTarget(5), [[1]] * 40, max_new_tokens=budgets, **options)) as run:
        for _ in run.steps():
            pass
        kept = [text.tokens if text.tokens.base is None else text.tokens.base for text in run.slots.written.values()]
    assert sum(array.nbytes for array in kept) == 8 * sum(map(len, run.emitted))


def test_the_memory_of_a_larger_batch_is_free_once_its_last_texts_have_moved(monkeypatch):
    caches, made = [], TreeCache.__init__

    def noting(self, *args):
        made(self, *args)
        caches.append(weakref.ref(self))

    monkeypatch.setattr(TreeCache, "__init__", noting)
    options = {**SAMPLED, "max_new_tokens": [12, 3, 3, 2, 2, 2], "stop_tokens": ()}
    request = as_request(TARGET, [[i] for i in range(6)], DRAFTERS["chain"](DRAFT), batch_size=4, **options)
    with Decoding(request) as run:
        for _ in run.steps():
            if len(run.held) < 4:
                assert [len(found.lengths) for cache in caches if (found := cache())] == [len(run.held)] * 2
    assert len(caches) >= 4


def test_notes_of_ended_texts_are_one_tensor_each():
    request = as_request(TARGET, MANY, batch_size=3, logprobs=True, max_new_tokens=BUDGETS, **SAMPLED)
    with Decoding(request) as run:
        for _ in run.steps():
            pass
        written = [run.slots.written[index] for index in range(len(MANY))]
        assert [len(text.notes) for text in written] == [1] * len(MANY)
        assert [len(text.noted) for text in written] == list(map(len, run.emitted))


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
