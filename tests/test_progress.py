"""A bar shows how far a job is, rarely enough to cost nothing, and is closed however the job ends."""

import re

import pytest

from specdec import progress
from specdec.progress import Progress


def drawings(capsys):
    """The states of the bar as a terminal has shown them, one after another, without the picture."""
    return [part.strip() for part in re.split(r"[\r\n]", capsys.readouterr().err) if part.strip()]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_the_bar_ends_with_the_figures_of_the_whole_job(capsys, clock):
    """8 rows and then 6 got 19 + 16 tokens, in 2 s; 5 texts of 9 are there."""
    with Progress(texts=9, rows=8, shown=True, ended=2) as bar:
        bar.step(ended=1, running=8, tokens=19)
        clock[0] += 2
        bar.step(ended=2, running=6, tokens=16)
    first, *_, last = drawings(capsys)
    assert " 2/9 [" in first
    assert " 5/9 [" in last
    assert last.endswith("18 tokens/s, 6 of 8 rows, acceptance length 2.50]")


def test_a_job_without_a_step_shows_no_figures(capsys):
    with Progress(texts=3, rows=1, shown=True, ended=3):
        pass
    assert " 3/3 [" in drawings(capsys)[-1]


def test_many_steps_are_drawn_a_few_times(capsys):
    """Also when no text ends: it is the time that decides."""
    with Progress(texts=9, rows=8, shown=True) as bar:
        for _ in range(5000):
            bar.step(ended=0, running=8, tokens=8)
    found = drawings(capsys)
    assert len(found) < 50
    assert found[-1].endswith("8 of 8 rows, acceptance length 1.00]")


def test_figures_are_drawn_when_no_text_ends(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    with Progress(texts=9, rows=2, shown=True) as bar:
        bar.step(ended=0, running=2, tokens=3)
        assert drawings(capsys)[-1].endswith("2 of 2 rows, acceptance length 1.50]")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_closes_the_bar_and_goes_on(capsys, error):
    bar = Progress(texts=9, rows=8, shown=True)
    with pytest.raises(error), bar:
        bar.step(ended=4, running=8, tokens=8)
        raise error
    written = capsys.readouterr().err
    assert " 4/9 [" in written and written.endswith("\n")
    assert bar._bar.disable  # as tqdm marks a closed one


def test_a_bar_that_is_not_shown_writes_nothing(capsys):
    with Progress(texts=9, rows=8, shown=False) as bar:
        bar.step(ended=1, running=8, tokens=8)
    assert capsys.readouterr() == ("", "")
