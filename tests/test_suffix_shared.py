"""Drafting from what other rows and earlier calls wrote after the same prompt: lossless, bounded, and kept nowhere else."""

import warnings
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_threads import together
from tiny_models import PROMPTS, llama

import specdec
from specdec import Law, Sampling
from specdec.arguments import as_request
from specdec.drafters import Drafter, Fallback, NgramDrafter, SuffixDrafter
from specdec.loop import Decoding
from specdec.testing import TabularTarget, exact_law, target_law
from specdec.testing.coins import ExactCoins, Script
from specdec.testing.drafters import Noting
from specdec.testing.tape import Tape

torch.set_num_threads(1)
PROMPT = (0, 1, 0)
TARGET = TabularTarget(3)
OPTIONS = {"sampling": Sampling(1.0), "stop_tokens": (2,)}


def shared():
    """Its trees have more than a chain."""
    return SuffixDrafter(6, 3, 2, threshold=0.05, shared=True)


def remembering(*texts):
    """A drafter that has written these texts after the prompt."""
    drafter = shared()
    for text in texts:
        others = SuffixDrafter(shared=True)
        others.memory = drafter.memory
        target = Written((*PROMPT, *text))
        specdec.generate(target, torch.tensor(PROMPT), others, max_new_tokens=len(text), stop_tokens=())
    return drafter


class Written(TabularTarget):
    """Continues every beginning of one text as it goes on."""

    def __init__(self, text):
        super().__init__(3)
        self.text = text

    def logits(self, text):
        return 9.0 * torch.nn.functional.one_hot(torch.tensor((*self.text, 0)[len(text)]), 3).double()


class Begun(Drafter):
    """A new drafter for each run: outcomes of coins are followed one after another, and none may know of another."""

    def __init__(self, make):
        self.make = make

    def spec(self, sampling):
        return self.make().spec(sampling)

    def start(self, target, batch, last=None):
        return self.make().start(target, batch)


MEMORIES = {"nothing": (), "one text": [(0, 0, 1)], "three texts": [(0, 0, 1), (1, 1, 0), (0, 1, 2)]}


FIRST = {"nothing": [1, 0], "one text": [0, 0], "three texts": [0, 1, 0, 1, 1]}  # what is drafted after the prompt


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", MEMORIES)
def test_the_law_of_a_text_is_the_targets_whatever_is_remembered(name, merge):
    options, noting = {**OPTIONS, "max_new_tokens": 3}, Noting(Begun(lambda: remembering(*MEMORIES[name])))
    law = exact_law(TARGET, PROMPT, noting, merge=merge, **options)
    assert law.total_variation(target_law(TARGET, PROMPT, **options)) == 0
    assert noting.drafts[0].kept == [0, *FIRST[name]]


class Part:
    """The coins of one call, in a script of several calls."""

    def __init__(self, script, call):
        self.script, self.call = script, call

    def flip(self, key, weights, decides=True):
        return self.script.flip((self.call, *key), weights, decides)


def call(drafter, seed, rows, coins, budget):
    """Texts of so many samples of the prompt."""
    prompts, options = [torch.tensor(PROMPT)] * rows, {**OPTIONS, "max_new_tokens": budget, "seed": seed}
    with Decoding(replace(as_request(TARGET, prompts, drafter, **options), coins=coins)) as run:
        while not run.finished:
            run.runs.coins.ended = [not going for going in run.running]
            run.step()
        return [tuple(text) for text in run.emitted]


def joint_law(calls, budget, same_coins=False):
    """The exact law of the texts of several calls, of so many rows each, that share a drafter."""
    law, queue = defaultdict(Fraction), [[]]
    while queue:
        script, drafter, texts = Script(queue.pop()), shared(), []
        for seed, rows in enumerate(calls):
            part = Part(script, 0 if same_coins else seed)
            texts += call(drafter, seed, rows, lambda rows, nodes, part=part: ExactCoins([part] * rows, nodes), budget)
        law[tuple(texts)] += script.probability
        queue += script.branches
    return law


def distance(law, other):
    return sum(abs(law.get(key, 0) - other.get(key, 0)) for key in {*law, *other}) / 2


@pytest.mark.parametrize("calls", [(2,), (1, 1), (1, 2)], ids=str)
def test_samples_of_one_prompt_are_independent_and_each_has_the_targets_law(calls):
    budget = 4 - sum(calls)  # tokens each: enumerated are all texts of all rows together
    one = target_law(TARGET, PROMPT, max_new_tokens=budget, **OPTIONS)
    every = product(one.items(), repeat=sum(calls))
    due = {tuple(text for text, _ in texts): prod(p for _, p in texts) for texts in every}
    law = joint_law(calls, budget)
    assert sum(law.values()) == 1
    assert distance(law, due) == 0


def test_drafts_drawn_by_the_coins_that_decide_about_them_would_change_the_law_and_are_refused():
    law, last = joint_law((1, 1), 2, same_coins=True), defaultdict(Fraction)
    for texts, probability in law.items():
        last[texts[-1]] += probability
    assert distance(last, target_law(TARGET, PROMPT, max_new_tokens=2, **OPTIONS)) > 0.05
    drafter, prompt = shared(), torch.tensor(PROMPT)
    for index in (0, 1):  # other coins
        specdec.generate(TARGET, prompt, drafter, seed=-1, first_index=index, **OPTIONS)
    with pytest.raises(
        ValueError, match=r"seed=18446744073709551615: a text that this seed drew .*seed=epoch.*memory\.clear\(\)"
    ):
        specdec.generate(TARGET, [prompt], drafter, seed=2**64 - 1, first_index=1, **OPTIONS)
    specdec.generate(TARGET, prompt.flip(0)[1:], drafter, seed=-1, **OPTIONS)  # another prompt
    drafter.memory.clear()
    specdec.generate(TARGET, prompt, drafter, seed=-1, **OPTIONS)


MODEL = llama(num_hidden_layers=2)
GREEDY = {"max_new_tokens": 24, "stop_tokens": ()}


def lists(out):
    return [t.tolist() for t in out.tokens]


@pytest.mark.parametrize(
    "engine", ["eager", "graph", specdec.Graphs(capture=Tape)], ids=["eager", "static", "captured"]
)
def test_what_an_earlier_call_wrote_is_drafted_to_its_last_token(engine):
    drafter, expected = (
        SuffixDrafter(25, 24, threshold=0.01, shared=True),
        lists(specdec.generate(MODEL, PROMPTS, **GREEDY)),
    )
    steps = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = specdec.generate(MODEL, PROMPTS, drafter, engine=engine, **GREEDY)
        assert lists(out) == expected
        steps.append(len(out.trace.steps))
    assert steps[0] > 3 and steps[1] == 1  # 23 drafted tokens, and one of the target's own


def test_rows_draft_from_what_the_rows_beside_them_have_written():
    options = {"sampling": Sampling(0.5), "max_new_tokens": 40, "stop_tokens": ()}
    accepted = []
    for share in (False, True):
        drafter = SuffixDrafter(shared=share)
        steps = specdec.generate(MODEL, [torch.tensor([5, 6, 7, 8])] * 8, drafter, **options).trace.steps
        accepted.append(sum(sum(step.accepted) for step in steps))
    assert accepted[1] > 1.5 * accepted[0] > 0


@pytest.mark.parametrize("share", [False, True])
def test_a_row_that_is_filled_again_begins_a_text_of_its_own_while_others_go_on(share):
    class Rows(list):
        """As much of a batch as it reads."""

        vocab, sampling, host_left, root = 50, Sampling(1.0), [9, 9], torch.tensor([3, 3])
        texts = property(lambda self: [np.array(text) for text in self])
        text = lambda self, row: np.array(self[row])  # noqa: E731
        prompts = host_lengths = property(lambda self: [len(text) for text in self])

    def drafts():
        tree = run.propose(None)
        return [[t for t, law in zip(*row, strict=True) if law != Law.PADDING][1:]
                for row in zip(tree.tokens.tolist(), tree.laws.tolist(), strict=True)]  # fmt: skip

    batch, drafter = Rows([[1, 2, 3], [7, 8]]), SuffixDrafter(shared=share)
    batch.keys = [(0, 0), (0, 1)]
    run = drafter.start(None, batch)
    run.enter([0, 1])
    run.commit(SimpleNamespace(invalid=[[], []], emitted=[[4, 5, 3], [9, 3]]))
    assert drafts()[0][:3] == [4, 5, 3] and drafts()[1] == []
    batch[1], batch.keys = [1, 2, 3], [(0, 0), (0, 2)]
    run.enter([1])
    assert drafts()[0][:3] == [4, 5, 3]
    assert drafts()[1][:3] == ([4, 5, 3] if share else [])
    run.commit(SimpleNamespace(invalid=[[], []], emitted=[[], [6, 3]]))
    assert set(drafts()[0][:2]) == ({4, 6} if share else {4, 5})


def test_other_prompts_and_other_drafters_know_nothing_of_it():
    prompt, other = torch.tensor([5, 6, 7]), torch.tensor([6, 7])
    drafter = SuffixDrafter(25, 24, threshold=0.01, shared=True)
    specdec.generate(MODEL, prompt, drafter, **GREEDY)
    for ours, text in ((drafter, other), (SuffixDrafter(25, 24, threshold=0.01, shared=True), prompt)):
        alone = specdec.generate(MODEL, text, SuffixDrafter(25, 24, threshold=0.01), **GREEDY)
        out = specdec.generate(MODEL, text, ours, **GREEDY)
        assert [step.accepted for step in out.trace.steps] == [step.accepted for step in alone.trace.steps]


def test_the_rest_of_a_text_that_a_fallback_wrote_is_remembered_too():
    drafter = SuffixDrafter(25, 24, threshold=0.01, shared=True)
    specdec.generate(MODEL, PROMPTS, Fallback(NgramDrafter(), drafter), **GREEDY)
    assert len(specdec.generate(MODEL, PROMPTS, drafter, **GREEDY).trace.steps) == 1


def test_memory_is_bounded_and_the_prompts_begun_longest_ago_are_forgotten_first():
    drafter, texts = (
        SuffixDrafter(25, 24, threshold=0.01, shared=True, remembered=70),
        [torch.tensor([k, k + 1]) for k in range(4)],
    )

    def steps(text):
        return len(specdec.generate(MODEL, text, drafter, **GREEDY).trace.steps)

    assert steps(texts[0]) > 1 and steps(texts[1]) > 1  # 26 tokens each
    assert steps(texts[0]) == 1  # the second prompt is now the older one; 24 tokens more
    assert drafter.memory.tokens == 76
    assert steps(texts[2]) > 1
    assert drafter.memory.tokens == 76  # 50 + 26
    assert steps(texts[0]) == 1
    assert steps(texts[1]) > 1
    drafter.memory.clear()
    assert drafter.memory.tokens == 0
    assert steps(texts[1]) > 1


def test_one_prompt_that_is_sampled_for_ever_is_begun_anew():
    drafter, most = SuffixDrafter(shared=True, remembered=100), 0
    for _ in range(12):
        specdec.generate(MODEL, torch.tensor([3, 4]), drafter, **GREEDY)
        most = max(most, drafter.memory.tokens)
    assert 100 < most <= 124


def test_runs_in_many_threads_share_the_memory_and_write_the_targets_texts():
    expected, drafter = lists(specdec.generate(MODEL, PROMPTS, **GREEDY)), SuffixDrafter(shared=True)
    works = [lambda: lists(specdec.generate(MODEL, PROMPTS, drafter, **GREEDY)) for _ in range(6)]
    assert together(works) == [expected] * 6
    assert drafter.memory.tokens == sum(map(len, PROMPTS)) + 6 * len(PROMPTS) * 24
    fresh = SuffixDrafter(shared=True)
    for _ in range(6):
        specdec.generate(MODEL, PROMPTS, fresh, **GREEDY)
    for known, due in zip(drafter.memory._texts.values(), fresh.memory._texts.values(), strict=True):
        assert known.automaton.count == due.automaton.count  # nothing was lost or mixed


def test_a_step_without_a_law_leaves_nothing_behind():
    class Breaking(TabularTarget):
        broken = True

        def logits(self, text):
            law = super().logits(text)
            return law * torch.nan if self.broken and len(text) > 4 else law

    target, drafter = Breaking(3), shared()
    options, prompt = {**OPTIONS, "stop_tokens": (), "max_new_tokens": 9}, torch.tensor(PROMPT)
    with pytest.raises(ValueError, match="logits are NaN"):
        specdec.generate(target, prompt, drafter, **options)
    assert 3 < drafter.memory.tokens <= 5
    target.broken = False
    assert len(specdec.generate(target, prompt, drafter, seed=1, **options).tokens[0]) == 9


def test_it_is_off_unless_asked_for_and_says_that_texts_depend_on_other_rows():
    drafter = SuffixDrafter()
    specdec.generate(MODEL, PROMPTS, drafter, **GREEDY)
    assert drafter.memory.tokens == 0
    assert SuffixDrafter().spec(Sampling()).by_row and not shared().spec(Sampling()).by_row
    assert repr(shared()).endswith("shared=True)") and "shared" not in repr(SuffixDrafter())


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_text_that_moves_to_a_smaller_batch_is_drafted_for_from_the_same_memory(batch_size):
    """The second epoch repeats the first, so that a draft is right wherever it is made."""
    model, drafter = llama(), SuffixDrafter(shared=True)
    options = {"max_new_tokens": [48, 8], "stop_tokens": (), "batch_size": batch_size}
    first, second = (specdec.generate(model, [[3, 4, 5]] * 2, drafter, **options) for _ in range(2))
    assert all(map(torch.equal, first.tokens, second.tokens))
    assert len(second.trace.steps) <= 6 and len(drafter.memory._texts) == 1


def test_a_job_in_hand_goes_on_with_the_texts_that_are_remembered(tmp_path):
    drafter, options = SuffixDrafter(shared=True), {"sampling": Sampling(0.8), "max_new_tokens": 12, "stop_tokens": ()}
    options |= {"num_samples": 3, "batch_size": 2}
    with specdec.stream(TARGET, [list(PROMPT)], drafter, journal=tmp_path / "run.jsonl", **options) as stream:
        begun = [next(stream) for _ in range(3)]
    assert {index for index, _ in begun} == {0, 1}
    found = specdec.generate(TARGET, [list(PROMPT)], drafter, journal=tmp_path / "run.jsonl", **options).tokens
    expected = specdec.generate(TARGET, [list(PROMPT)], SuffixDrafter(shared=True), **options).tokens
    assert [len(text) for text in found] == [12] * 3 and len(expected) == 3
    assert len(drafter.memory._texts) == 1
