"""A journal that is being written."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np

from specdec.journal.entries import first_line, read_from, text_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_SECONDS = 1.0  # between two waits for the disk: one takes about 0.1 ms on a fast disk, and 10 ms on a slow one

Tokens = Sequence[int] | np.ndarray
Column = Sequence[float] | np.ndarray


class Journal:
    """A journal that is being written. No other process can open it meanwhile.

    >>> with Journal("run.jsonl", settings) as journal:
    ...     journal.end(0, [5, 7, 9])
    ...     journal.pause(1, [8], step=1)

    A text is in the file when `end` returns: a process that is killed does not lose it. The disk is waited for at most once
    a second, and when the journal is closed: should the whole machine fail, texts of the last moments are written again.
    A journal that could not be written keeps what it held. Memory grows by the texts that the file held when it was opened,
    and by one number for each later one.

    The lock is the file system's own (flock). Where there is none (Windows, some network file systems), a warning says so.

    Args:
        path: the file; it is made if it is not there, else the job goes on from it.
        settings: all that decides the texts: names, each with a value that JSON can hold. See `settings_of`.

    Attributes:
        finished, skipped, in_hand: what the file held when it was opened, by the place of each text in the job: see `Entries`.

    Raises:
        ValueError: it cannot be opened, another process writes to it, it is of a job with other settings, it is no journal, or
            it is damaged.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]):
        self.path, settings = os.fspath(path), json.loads(json.dumps(settings))
        self._synced = time.monotonic()
        # Unbuffered: what was written is in the file, and of a write that failed nothing is left to be written later.
        # "a" makes the file if there is none, and changes nothing before it is known to be a journal of this job.
        try:
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - `close` closes it
        except OSError as error:
            raise ValueError(
                f"journal={self.path!r} cannot be opened ({error.strerror}); pass a file in a folder that is there and may be "
                "written to."
            ) from error
        try:
            _lock(self._file, self.path)
            with open(self.path, "rb") as file:
                found, entries, self._size = read_from(file, self.path)
            self.finished, self.skipped, self.in_hand = entries.finished, entries.skipped, entries.in_hand
            self._final = set(self.finished)
            if found is None:
                self._append(first_line(settings))
            else:
                _compare(found, settings, self.path)
                self._file.truncate(self._size)
        except BaseException:
            self._file.close()
            raise

    def end(self, text: int, tokens: Tokens, **columns: Column) -> None:
        """Write a finished text. When this returns, it is in the file, and whatever is written of it later does not count.

        Args:
            text: its place in the job.
            tokens: [length] int64: its new tokens, those that it had when the journal was opened included.
            columns: [length] float64 each: one number per token, under any name.
        """
        self._put(text, text_line(tokens, columns))
        self._final.add(text)
        if time.monotonic() - self._synced > _SECONDS:
            self._sync()

    def pause(self, text: int, tokens: Tokens, step: int, **columns: Column) -> None:
        """Write what there is of a text when the job is interrupted, after `step` steps of its own."""
        self._put(text, {**text_line(tokens, columns), "step": step})

    def skip(self, text: int, reason: str) -> None:
        """Write why a prompt cannot be decoded."""
        self._put(text, {"skipped": reason})

    def close(self) -> None:
        """Wait for the disk and let others write. Closing twice does no harm."""
        if not self._file.closed:
            try:
                self._sync()
            finally:
                self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, text: int, line: Mapping[str, Any]) -> None:
        # An interrupt may come after a text was written and before the caller knows: it may write all once more.
        if text not in self._final:
            self._append({"text": text, **line})

    def _append(self, line: Mapping[str, Any]) -> None:
        """Write a line after the last whole one, in place of what an interrupted or failed write may have left there."""
        data = memoryview(json.dumps(line).encode() + b"\n")
        try:
            self._file.truncate(self._size)
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._size)
            raise self._failed(error) from error
        self._size += len(data)

    def _sync(self) -> None:
        """Wait until all that was written is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self._synced = time.monotonic()

    def _failed(self, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"{error.strerror}: the journal cannot be written. {len(self._final)} finished texts are in it; make room, or "
            "mend what else is wrong, and the same call goes on from there",
            self.path,
        )


def _lock(file: BinaryIO | Any, path: str) -> None:
    """Keep others from writing; the lock ends with the process and those that it has forked, however they end."""
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process, or another call in this one, writes to the journal {path}; wait for its end, close the "
            "stream if it is one, or give each part of the job a journal of its own."
        ) from None
    except OSError as error:
        warnings.warn(f"{path} cannot be locked ({error}): let no other process write to it.", stacklevel=3)


def _compare(there: Mapping[str, Any], here: Mapping[str, Any], path: str) -> None:
    """Raise ValueError if the journal is of a job with other settings, and say which."""
    names = [name for name in {**there, **here} if _shown(there, name) != _shown(here, name)]
    if names:
        differing = "; ".join(f"{name} is {_shown(there, name)} there, {_shown(here, name)} here" for name in names)
        raise ValueError(
            f"the journal {path} is of a job with other settings: {differing}. Pass what is there to go on with that job, or "
            "another path to begin this one."
        )


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not given"
