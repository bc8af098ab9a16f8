"""A journal loses no finished text and doubles none, whatever stops the job, and is gone on with by the same job only."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.journal import Journal, Kept, read
from specdec.journal import journal as writing

SETTINGS = {"target": "Llama", "seed": 5, "stop tokens": [0, 7], "top_p": None}


def shown(found):
    """Finished texts, skipped ones and those in hand, in values that compare; of a journal or of what `read` returns."""
    one = lambda text: (text.tokens.tolist(), text.step, {name: c.tolist() for name, c in text.columns.items()})  # noqa: E731
    texts = [{i: one(text) for i, text in sorted(part.items())} for part in (found.finished, found.in_hand)]
    return texts[0], dict(sorted(found.skipped.items())), texts[1]


def held(path):
    return shown(read(path)[1])


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


def test_a_journal_holds_the_settings_and_every_text(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, SETTINGS) as journal:
        assert shown(journal) == ({}, {}, {})
        journal.end(2, np.array([3, 4]), logprobs=np.array([-0.1, -np.inf], np.float32))
        journal.end(0, [])
        journal.skip(1, "prompt 1 is empty; give at least one token.")
        journal.pause(3, [8, 9, 9], step=2, logprobs=[-1.5, -0.25, 0.0])
    expected = (
        {0: ([], None, {}), 2: ([3, 4], None, {"logprobs": [float(np.float32(-0.1)), -np.inf]})},
        {1: "prompt 1 is empty; give at least one token."},
        {3: ([8, 9, 9], 2, {"logprobs": [-1.5, -0.25, 0.0]})},
    )
    assert held(path) == expected and read(path)[0] == SETTINGS
    assert [json.loads(line) for line in lines(path)[1:3]][1] == {"text": 0, "tokens": []}
    with Journal(str(path), SETTINGS) as journal:
        assert shown(journal) == expected
        assert journal.finished[2].tokens.dtype == np.int64
        assert isinstance(journal.in_hand[3], Kept)


def test_a_text_is_in_the_file_when_end_returns(tmp_path):
    with Journal(tmp_path / "run.jsonl", SETTINGS) as journal:
        for i in range(3):
            journal.end(i, [i])
            assert list(read(journal.path)[1].finished) == [*range(i + 1)]


def test_the_disk_is_waited_for_once_a_second_and_at_the_end(tmp_path, monkeypatch):
    """So that should the machine fail, no more than the last second is lost, and steps do not wait for the disk."""
    now, waits = [0.0], []
    monkeypatch.setattr(writing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(writing.os, "fsync", lambda file: waits.append(now[0]))
    with Journal(tmp_path / "run.jsonl", SETTINGS) as journal:
        for i in range(40):
            now[0] = i / 10
            journal.end(i, [1])
    assert waits == [1.1, 2.2, 3.3, 3.9]


@pytest.mark.parametrize("again", ["end", "pause", "skip"])
def test_a_finished_text_is_final(tmp_path, again):
    """Within the run that wrote it, and for the next, even if its line is there twice."""
    path = tmp_path / "run.jsonl"
    later = {"end": [1, [6, 6]], "pause": [1, [6], 1], "skip": [1, "why"]}[again]
    for _ in range(2):
        with Journal(path, SETTINGS) as journal:
            journal.end(1, [5])
            getattr(journal, again)(*later)
    assert len(lines(path)) == 2
    path.write_bytes(path.read_bytes() + b'{"text": 1, "tokens": [6, 6]}\n{"text": 1, "tokens": [6], "step": 1}\n')
    assert held(path) == ({1: ([5], None, {})}, {}, {})


def test_a_later_line_replaces_one_of_a_text_that_is_not_finished(tmp_path):
    with Journal(tmp_path / "run.jsonl", SETTINGS) as journal:
        journal.pause(0, [5], 1)
        journal.pause(1, [6], 1)
        journal.skip(2, "too long")
        journal.pause(0, [5, 7], 2)
        journal.end(1, [6, 8])
        journal.end(2, [9])
    assert held(journal.path) == ({1: ([6, 8], None, {}), 2: ([9], None, {})}, {}, {0: ([5, 7], 2, {})})


TEXT, TOKENS = st.integers(0, 3), st.lists(st.integers(0, 2**31), max_size=3)
LINE = st.one_of(
    st.tuples(st.just("end"), TEXT, TOKENS),
    st.tuples(st.just("pause"), TEXT, TOKENS, st.integers(0, 9)),
    st.tuples(st.just("skip"), TEXT, st.text(max_size=3)),
)


def expected_of(written):
    """What a journal should hold after these calls."""
    finished, skipped, in_hand = {}, {}, {}
    for kind, i, *rest in written:
        if i in finished:
            continue
        skipped.pop(i, None)
        in_hand.pop(i, None)
        if kind == "end":
            finished[i] = (rest[0], None, {})
        elif kind == "pause":
            in_hand[i] = (rest[0], rest[1], {})
        else:
            skipped[i] = rest[0]
    return tuple(dict(sorted(part.items())) for part in (finished, skipped, in_hand))


def write(path, calls, cut=None):
    """Make these calls. `cut`, from 0 to 1, is where in the file the last write ends."""
    with Journal(path, SETTINGS) as journal:
        before = path.stat().st_size
        for kind, *values in calls:
            before = path.stat().st_size
            getattr(journal, kind)(*values)
    if cut is not None:
        size = path.stat().st_size
        os.truncate(path, before + int(cut * (size - before)))
        return calls if cut == 1 or size == before else calls[:-1]
    return calls


@settings(deadline=None, derandomize=True)
@given(sessions=st.lists(st.tuples(st.lists(LINE, max_size=5), st.floats(0, 1)), max_size=4))
def test_whenever_a_write_is_cut_short_all_before_it_is_kept_and_nothing_is_doubled(tmp_path_factory, sessions):
    path, written = tmp_path_factory.mktemp("journal") / "run.jsonl", []
    for calls, cut in sessions:
        written += write(path, calls, cut)
        with Journal(path, SETTINGS) as journal:
            assert shown(journal) == expected_of(written)
    whole = [json.loads(line) for line in lines(path)[1:]] if sessions else []
    ended = [line["text"] for line in whole if "tokens" in line and "step" not in line]
    assert len({*ended}) == len(ended)


@settings(deadline=None, derandomize=True)
@given(calls=st.lists(LINE, max_size=6), cut=st.floats(0, 1), more=st.lists(LINE, max_size=3))
def test_a_file_that_ends_at_any_byte_is_gone_on_with_from_its_last_whole_line(tmp_path_factory, calls, cut, more):
    """The line of the settings included: nothing is whole then, and the journal is new."""
    path = tmp_path_factory.mktemp("journal") / "run.jsonl"
    calls = [call for i, call in enumerate(calls) if ("end", call[1]) not in [c[:2] for c in calls[:i]]]  # each a line
    write(path, calls)
    os.truncate(path, int(cut * path.stat().st_size))
    count = path.read_bytes().count(b"\n")
    write(path, more)
    assert held(path) == expected_of([*calls[: max(count - 1, 0)], *more])
    assert read(path)[0] == SETTINGS


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("written", [0, 1, 9])
def test_a_write_that_stops_half_way_leaves_no_half_line_before_the_next(tmp_path, stop, written):
    journal = Journal(tmp_path / "run.jsonl", SETTINGS)
    journal.end(0, [5])
    file = journal._file

    class Stopping:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            file.write(data[:written])
            raise stop

    journal._file = Stopping()
    with pytest.raises((KeyboardInterrupt, OSError)):
        journal.end(1, [6, 7])
    journal._file = file
    journal.pause(1, [6], 1)
    journal.close()
    assert held(journal.path) == ({0: ([5], None, {})}, {}, {1: ([6], 1, {})})


def test_a_full_disk_is_an_error_that_says_so_and_loses_no_finished_text(tmp_path):
    """A limit on the size of files stands for the disk: the last write is cut short in the same way."""
    path, before = tmp_path / "run.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path, SETTINGS) as journal:
        journal.end(0, [5])
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        try:
            with pytest.raises(OSError, match=r"File too large: .* 1 finished texts are in it; make room.*run\.jsonl"):
                journal.end(1, [6] * 20)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert held(path) == ({0: ([5], None, {})}, {}, {})
        journal.end(1, [6] * 20)
    assert held(path) == ({0: ([5], None, {}), 1: ([6] * 20, None, {})}, {}, {})


def test_a_journal_of_other_settings_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, {**SETTINGS, "old": 1}) as journal:
        journal.end(0, [5])
    before = path.read_bytes()
    with pytest.raises(ValueError) as refused:
        Journal(path, {**SETTINGS, "seed": 6, "stop tokens": [7], "new": "ä"})
    assert str(refused.value) == (
        f"the journal {path} is of a job with other settings: seed is 5 there, 6 here; stop tokens is [0, 7] there, [7] here; "
        'old is 1 there, not given here; new is not given there, "ä" here. Pass what is there to go on with that job, or '
        "another path to begin this one."
    )
    assert path.read_bytes() == before
    Journal(path, {"stop tokens": (0, 7), "top_p": None, "target": "Llama", "seed": 5, "old": 1}).close()


def test_two_may_not_write_to_a_journal_at_once(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, SETTINGS) as journal:
        with pytest.raises(
            ValueError,
            match=r"another process, or another call.*run\.jsonl; wait for its end, close the stream",
        ):
            Journal(path, SETTINGS)
        journal.end(0, [5])
    with Journal(path, SETTINGS) as journal, pytest.raises(KeyboardInterrupt):
        assert list(journal.finished) == [0]
        with journal:
            raise KeyboardInterrupt
    Journal(path, SETTINGS).close()


def test_a_refused_journal_is_let_go_of(tmp_path):
    Journal(tmp_path / "run.jsonl", SETTINGS).close()
    with pytest.raises(ValueError, match="other settings"):
        Journal(tmp_path / "run.jsonl", {})
    Journal(tmp_path / "run.jsonl", SETTINGS).close()


@pytest.mark.parametrize("lacking", ["system", "file system"])
def test_where_files_cannot_be_locked_a_warning_says_so(tmp_path, monkeypatch, lacking):
    def refuse(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    if lacking == "system":
        monkeypatch.setattr(writing, "fcntl", None)
    else:
        monkeypatch.setattr(writing.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"run\.jsonl cannot be locked \(.*\): let no other process"):
        journal = Journal(tmp_path / "run.jsonl", SETTINGS)
    with journal:
        journal.end(0, [5])
    assert held(journal.path)[0] == {0: ([5], None, {})}


MARK = b'{"specdec_journal": 1, "settings": {}}\n'
NO_JOURNALS = {
    "text": (b"dear diary", "is not a journal; pass the path of one"),
    "other lines": (b'{"prompt": [1]}\n', "is not a journal; pass the path of one"),
    "an empty line": (b"\n", "is not a journal; pass the path of one"),
    "another format": (b'{"specdec_journal": 2, "settings": {}}\n', r"line 1 .* has format 2, .* writes format 1\)"),
    "a damaged line": (
        MARK + b'{"text": 0, "tok\n{"text": 1, "tokens": [5]}\n',
        "line 2 of the journal.*remove that line",
    ),
    "an unfinished line": (MARK + b'{"text": 0}{"text": 1, "tokens": [5]}\n{"text": 2', "line 2 of the journal"),
    "no tokens": (MARK + b'{"text": 0}\n', r"line 2 of the journal.*'tokens'.*remove that line"),
    "tokens that are none": (MARK + b'{"text": 0, "tokens": ["a"]}\n', "line 2 of the journal"),
    "no text": (MARK + b"[]\n", "line 2 of the journal"),
}


@pytest.mark.parametrize("case", NO_JOURNALS)
def test_what_is_no_journal_is_refused_and_left_as_it_is(tmp_path, case):
    path, (data, cure) = tmp_path / "run.jsonl", NO_JOURNALS[case]
    path.write_bytes(data)
    for opened in (lambda: Journal(path, {}), lambda: read(path)):
        with pytest.raises(ValueError, match=cure):
            opened()
    assert path.read_bytes() == data


def test_an_empty_journal_is_begun_but_not_read(tmp_path):
    (tmp_path / "run.jsonl").touch()
    with pytest.raises(ValueError, match="is empty; run the job"):
        read(tmp_path / "run.jsonl")
    Journal(tmp_path / "run.jsonl", SETTINGS).close()
    assert read(tmp_path / "run.jsonl")[0] == SETTINGS


def test_columns_have_a_number_for_each_token(tmp_path):
    with (
        Journal(tmp_path / "run.jsonl", SETTINGS) as journal,
        pytest.raises(ValueError, match="1 numbers for 2 tokens"),
    ):
        journal.end(0, [5, 6], logprobs=[-1.0])
    assert held(journal.path) == ({}, {}, {})


ENDLESS = """
import sys
from specdec.journal import Journal
with Journal(sys.argv[1], {}) as journal:
    for i in range(10**9):
        journal.end(i, [i] * 50)
        print(i, flush=True)
"""


def test_a_killed_process_loses_no_text_and_leaves_no_lock(tmp_path):
    path = tmp_path / "run.jsonl"
    command, root = [sys.executable, "-c", ENDLESS, str(path)], Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        told = [int(process.stdout.readline()) for _ in range(20)]
        with pytest.raises(ValueError, match="another process"):
            Journal(path, {})
        process.kill()
        told += map(int, process.stdout.read().split())
    with Journal(path, {}) as journal:
        assert set(told) <= set(journal.finished) and told == [*range(len(told))]
        assert all(text.tokens.tolist() == [i] * 50 for i, text in journal.finished.items())
        assert sorted(journal.finished) == [*range(len(journal.finished))]
        journal.end(len(journal.finished), [1])
