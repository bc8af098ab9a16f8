"""Whoever drafts at a loss is told so once, with the numbers; whoever may be at none is told nothing."""

import warnings

import pytest
import torch
from small_drafters import Proposing

import specdec
from specdec import Law, TreeSpec
from specdec.clock import Clock
from specdec.drafters import Paused
from specdec.testing import TabularTarget
from specdec.trace import CostlyDraftsWarning
from specdec.trace.bill import STEPS, Bill
from specdec.tree import tree_of_points

torch.set_num_threads(1)


class Wrong(Proposing):
    """Drafts what the target never writes."""

    def spec(self, sampling):
        return TreeSpec(frozenset({Law.POINT}), nodes=2, depth=1, width=1, by_depth=True)

    def propose(self, batch, coins):
        return tree_of_points(batch.root, [[(2, 0)] if batch.max_depth else []] * len(batch))


class Falling(TabularTarget):
    """Writes no 2."""

    def logits(self, text):
        return torch.tensor([0.0, 1.0, -9.0])


def told(steps) -> list[str]:
    """What is said of these steps: (nodes, gained, seconds of drafting, of the rest)."""
    bill = Bill()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            bill.note(*step)
    assert {warning.category for warning in caught} <= {CostlyDraftsWarning}
    return [str(warning.message) for warning in caught]


def test_warning_says_what_drafting_took_and_the_most_that_it_saved():
    (text,) = told([(5, 1.25, 3.0, 2.0)] * STEPS)
    assert (
        f"in {STEPS} steps drafting took 570 s, and the 50 steps that it saved would have taken at most 100 s" in text
    )
    assert "specdec.drafters.Paused(drafter)" in text


def test_warning_comes_once_and_not_before_so_many_steps_with_a_draft():
    step = (5, 1.25, 3.0, 2.0)
    assert told([step] * (STEPS - 1)) == []
    assert told([step] * (STEPS - 1) + [(1, 1, 3.0, 2.0)] * STEPS) == []
    assert len(told([step] * 3 * STEPS)) == 1


@pytest.mark.parametrize(
    "gained, drafting, rest, loss", [(2.87, 3.0, 1.4, True), (2.89, 3.0, 1.4, False), (1.0, 0.1, 2.0, False)]
)
def test_loss_is_more_than_a_twentieth_of_the_time_even_if_a_step_without_a_draft_takes_as_long_as_the_rest(
    gained, drafting, rest, loss
):
    """Of 880 s, drafting is 570, its 10 longest left out; saved steps are 1.87 or 1.89 x 200 x 1.4 s, which is 524 or 529."""
    assert bool(told([(5, gained, drafting, rest)] * STEPS)) == loss


def test_drafting_that_took_long_a_few_times_is_no_loss():
    """As it does where something is compiled."""
    assert told([(5, 2.0, 1000.0, 1.0)] * 10 + [(5, 2.0, 0.5, 1.0)] * (STEPS - 10)) == []


def test_texts_that_end_early_are_not_gained_by_their_draft():
    assert len(told([(2, 100.0, 3.0, 1.0)] * STEPS)) == 1


@pytest.fixture
def _costly(monkeypatch):
    """Drafting takes three times as long as all the rest, which takes a second."""
    monkeypatch.setattr(Clock, "seconds", lambda self: [0.0, 3.0, 1.0, 0.0, 0.0, 0.0])


@pytest.mark.usefixtures("_costly")
@pytest.mark.parametrize("batch_size", [None, 2])
def test_run_at_a_loss_warns(batch_size):
    with pytest.warns(CostlyDraftsWarning, match="570 s, and the 0 steps"):
        specdec.generate(
            Falling(3), [[0]] * 3, Wrong(), max_new_tokens=STEPS + 2, batch_size=batch_size, stop_tokens=()
        )


@pytest.mark.usefixtures("_costly")
@pytest.mark.parametrize(
    "drafter", [None, Paused(Wrong()), Paused(Wrong(), seconds=float)], ids=["none", "paused", "timed"]
)
def test_run_without_drafts_and_one_that_pauses_them_warn_not(drafter):
    out = specdec.generate(Falling(3), [[0]], drafter, max_new_tokens=2 * STEPS, stop_tokens=())
    assert len(out.trace.steps) == 2 * STEPS
