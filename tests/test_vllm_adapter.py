"""Drafters from text in vLLM: a stand-in of its model runner is given the chains that our own runs draft."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import llama

import specdec
from specdec.adapters.vllm import Ngram, Proposer, Suffix
from specdec.drafters import ModelDrafter, SuffixDrafter
from specdec.testing import TabularTarget
from specdec.testing.drafters import Noting

torch.set_num_threads(1)
LONGEST = 64


def config(tokens=12, vocab=4):
    """What a proposer reads of a VllmConfig."""
    model = SimpleNamespace(max_model_len=LONGEST, get_vocab_size=lambda: vocab)
    return SimpleNamespace(model_config=model, speculative_config=SimpleNamespace(num_speculative_tokens=tokens))


class Runner:
    """Calls a proposer as vLLM 0.33 does after each step, with the texts of its rows."""

    def __init__(self, proposer):
        self.proposer, self.tokens = proposer, np.zeros((3, LONGEST), np.int32)
        self.lengths = np.zeros(3, np.int32)

    def step(self, texts, new):
        for row, text in enumerate(texts):
            self.lengths[row] = len(text)
            self.tokens[row, : len(text)] = text
        return self.proposer.propose(new, self.lengths, self.tokens, slot_mappings=None)


def chain(draft):
    """The first children of a noted draft, from the root down."""
    path, node = [], 0
    for i, (token, parent, law) in enumerate(zip(draft.tokens, draft.parents, draft.laws, strict=True)):
        if parent == node and law != specdec.Law.PADDING:
            path, node = [*path, token], i
    return path


@pytest.mark.parametrize("kind", [Ngram, Suffix])
def test_drafts_are_those_of_our_own_runs_whatever_row_a_request_is_in(kind):
    noting, prompts = Noting(kind.drafter), [torch.tensor([0, 1, 0, 1]), torch.tensor([2, 1, 2])]
    specdec.generate(TabularTarget(4), prompts, noting, max_new_tokens=40, stop_tokens=())
    drafts = [[d for d in noting.drafts if list(d.text[: len(p)]) == p.tolist()] for p in prompts]
    runner, some = Runner(kind(config())), 0
    for step, both in enumerate(zip(*drafts, strict=False)):
        rows = both[::-1] if 3 <= step < 5 else both
        found = runner.step([*(d.text for d in rows), ()], [*([d.text[-1]] for d in rows), []])
        for tokens, draft in zip(found, rows, strict=False):
            assert tokens[: len(chain(draft))] == chain(draft)
            some += len(chain(draft)) > 1
        assert found[2] == []
    assert some > 5


def test_drafts_end_where_the_engine_says():
    runner, text = Runner(Ngram(config(tokens=3))), [0, 1, 2, 3] * 16
    assert runner.step([text[:12]], [[3]]) == [[0, 1, 2]]
    assert runner.step([text[:62]], [[1]]) == [[2]], "a longer draft would not fit max_model_len"
    assert runner.step([text], [[2, 3]]) == [[]]


def test_drafters_that_need_more_than_the_text_of_a_row_are_refused():
    for drafter in (ModelDrafter(llama()), SuffixDrafter(shared=True)):
        made = type("Mine", (Proposer,), {"drafter": drafter})
        with pytest.raises(ValueError, match="does not draft from the row's text alone"):
            made(config())
