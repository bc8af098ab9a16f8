"""The certificate of slots: texts that enter used rows have the target's law, whatever was there before; leaks are found."""

from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import prod
from unittest.mock import patch

import pytest
import torch

from certificates.cases import ROUNDING, llama
from specdec import Law, Sampling
from specdec.batch import Batch
from specdec.coins import Coins
from specdec.drafters import (
    Fallback,
    LayerSkipDrafter,
    MedusaDrafter,
    MedusaHeads,
    ModelDrafter,
    SuffixDrafter,
)
from specdec.drafters.suffix import _SuffixRun
from specdec.models import held_texts
from specdec.rules import BlockVerification, TraversalVerification
from specdec.testing import Table, TabularDrafter, TabularTarget, assert_drafter, exact_law_in_slots, target_law
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)
PROMPTS = [(0, 1, 0), (1,), (1, 1, 0)]
BUDGETS = [2, 2, 2]
TABLE, DRAFT = TabularTarget(2, 0), Table(2, 1)
TARGET = llama(0, 2)
BIASED = 1e-3
TWO = Sampling(1.0, top_k=2)  # of the four tokens of the Llamas


def distance(target, drafter, batch_size, prompts=PROMPTS, budgets=BUDGETS, **options):
    """Total variation between the law of all texts and the product of the target's own laws."""
    law = exact_law_in_slots(target, prompts, drafter, batch_size=batch_size, max_new_tokens=budgets, **options)
    assert abs(sum(law.values()) - 1) <= (0 if isinstance(target, TabularTarget) else ROUNDING)
    options.pop("rule", None)
    own = [target_law(target, prompt, max_new_tokens=n, **options) for prompt, n in zip(prompts, budgets, strict=True)]
    due = {
        tuple(text for text, _ in each): prod(mass for _, mass in each) for each in product(*(o.items() for o in own))
    }
    return float(sum(abs(law.get(t, Fraction(0)) - due.get(t, Fraction(0))) for t in law.keys() | due.keys()) / 2)


IN_TABLES = {
    "none": (None, {}),
    "chain": (TabularDrafter(DRAFT, Chain(1)), {}),
    "pairs": (TabularDrafter(DRAFT, Widths((2,), Law.WITHOUT_REPLACEMENT)), {}),
    "block": (TabularDrafter(DRAFT, Chain(1)), {"rule": BlockVerification()}),
    "traversal": (
        TabularDrafter(DRAFT, Widths((2,), Law.IID)),
        {"rule": TraversalVerification(), "budgets": [2, 2, 1]},
    ),
    "dynamic": (TabularDrafter(DRAFT, Dynamic(3, 1, 2)), {}),
    "suffixes": (SuffixDrafter(), {}),
    "suffixes, then a table": (Fallback(SuffixDrafter(), TabularDrafter(DRAFT, Chain(1))), {}),
    "stop tokens": (TabularDrafter(DRAFT, Chain(1)), {"stop_tokens": (1,)}),
}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("case", IN_TABLES)
def test_all_texts_have_the_targets_law_whatever_rows_they_enter(case, batch_size):
    drafter, options = IN_TABLES[case]
    assert distance(TABLE, drafter, batch_size, **options) == 0


def heads():
    made = MedusaHeads(1, 1, 16)
    torch.manual_seed(5)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.double().eval()


IN_LLAMAS = {
    "none": None,
    "chain": ModelDrafter(llama(1, 1), Chain(1)),
    "heads": MedusaDrafter(heads(), Chain(1)),
    "layers left out": LayerSkipDrafter(skip=[1], tree=Chain(1)),
    "suffixes, then a model": Fallback(SuffixDrafter(), ModelDrafter(llama(1, 1), Chain(1))),
}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("case", IN_LLAMAS)
def test_a_second_tenant_of_a_cache_has_the_targets_law(case, batch_size):
    assert distance(TARGET, IN_LLAMAS[case], batch_size, budgets=[2, 2, 1], sampling=TWO) <= ROUNDING


# Leaks from tenant to tenant, each planted in one place


_coins_enter, _batch_enter = Coins.enter, Batch.enter


def coins_of_the_last_text(self, rows, keys, steps):
    known = getattr(self, "keys", keys)
    _coins_enter(self, rows, [known[row] for row in rows], steps)


def slots_not_taken_over(a, b):
    """Whatever a row of the cache holds is taken for the text's own beginning."""
    return min(len(a), len(b))


def budget_of_the_last_text(self, row, text, length=None):
    first = self.__dict__.setdefault("first", {}).setdefault(row, text.left)
    _batch_enter(self, row, replace(text, left=first), length)


def processors_of_the_last_text(self, row, text, length=None):
    before = self.processors[row]
    _batch_enter(self, row, text, length)
    self.processors[row] = before or self.processors[row]


class Counting:
    """A logits processor with state."""

    calls = 0

    def __call__(self, text, scores):
        self.calls += 1
        return scores + torch.tensor([self.calls % 3, 0.0])


class LawsOfTheLastText(TabularDrafter):
    """Draws by the new text's law, and records that of the text which was in the row before."""

    leaks = False

    def start(self, target, batch, last=None):
        run = super().start(target, batch)
        run.kept = last.kept if last is not None else {}
        propose = run.propose

        def proposed(coins):
            tree = propose(coins)
            if tree.draft_probs is None:
                return tree
            firsts = [int(text[0]) for text in batch.texts]
            kept = [run.kept.setdefault(row, (first, tree.draft_probs[row])) for row, first in enumerate(firsts)]
            if not self.leaks:
                return tree
            own = zip(firsts, kept, tree.draft_probs, strict=True)
            laws = [mine if first == of else other for first, (of, other), mine in own]
            return replace(tree, draft_probs=torch.stack(laws))

        run.propose = proposed
        return run


PROCESSED = {"sampling": Sampling(1.0, processors=(Counting(),))}
LEAKS = {
    "coins": (TABLE, TabularDrafter(DRAFT, Chain(1)), {}, (Coins, "enter", coins_of_the_last_text)),
    "coins, without a draft": (TABLE, None, {}, (Coins, "enter", coins_of_the_last_text)),
    "the target's cache": (TARGET, None, {"sampling": TWO}, (held_texts, "common_length", slots_not_taken_over)),
    "budget": (TABLE, None, {"budgets": [3, 2, 1]}, (Batch, "enter", budget_of_the_last_text)),
    "processors": (TABLE, None, PROCESSED, (Batch, "enter", processors_of_the_last_text)),
    "laws of drafts": (TABLE, LawsOfTheLastText(DRAFT, Chain(1)), {}, (LawsOfTheLastText, "leaks", True)),
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_from_tenant_to_tenant_is_found(leak, batch_size):
    target, drafter, options, planted = LEAKS[leak]
    assert distance(target, drafter, batch_size, **options) <= ROUNDING
    with patch.object(*planted):
        assert distance(target, drafter, batch_size, **options) > BIASED


def test_a_drafter_that_keeps_the_last_text_of_a_row_breaks_its_contract():
    prompts, enter = [(0, 1, 0, 1), (1, 1)], _SuffixRun.enter

    def keeps(run, rows):
        enter(run, [row for row in rows if not run._states[row]])

    assert_drafter(SuffixDrafter(), TABLE, prompts)
    with patch.object(_SuffixRun, "enter", keeps), pytest.raises(AssertionError, match="afresh"):
        assert_drafter(SuffixDrafter(), TABLE, prompts)
