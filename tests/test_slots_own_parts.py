"""Targets and drafters of one's own, and pauses, in rows that are filled again."""

import pytest
import torch
from captured import DRAFT
from many_texts import alone, texts

from specdec import Sampling
from specdec.drafters import Drafter, DraftRun, Fallback, ModelDrafter, NgramDrafter, Paused
from specdec.drafters.balance import Balance
from specdec.models.target import Scores, Target, TargetRun
from specdec.testing import Table, TabularDrafter, TabularTarget
from specdec.trees import Chain

torch.set_num_threads(1)


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


# points are drafted only if the balance, half a step, affords them
@pytest.mark.parametrize(
    ("inner", "dear"), [(NgramDrafter(2), 1.5), (Fallback(NgramDrafter(2), ModelDrafter(DRAFT)), 100.0)], ids=str
)
def test_a_pause_outlives_the_texts_that_enter(inner, dear, monkeypatch):
    seen, see = [], Balance.see

    def noted(self, nodes, *more):
        seen.append(nodes)
        see(self, nodes, *more)

    monkeypatch.setattr(Balance, "see", noted)
    # the first draft is too dear for the rest of the run
    drafter = Paused(inner, patience=0.5, share=0.01, seconds=lambda nodes: 1.0 if nodes == 1 else dear)
    texts([[3, 4] * 6] * 12, drafter, batch_size=1, max_new_tokens=[2, 3, 4] * 4, stop_tokens=())
    assert len([nodes for nodes in seen if nodes]) == 1
