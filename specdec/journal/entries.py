"""What a journal holds: a JSON-lines file, whose first line has the settings of the job. After it, in any order:

    {"text": 3, "tokens": [5, 7]}                a finished text: its new tokens, and one list per column if there are any
    {"text": 4, "skipped": "prompt 4 is ..."}    a prompt that cannot be decoded, and why
    {"text": 5, "tokens": [8], "step": 1}        a text in hand when the job was interrupted, and how many steps it had taken

A later line for a text replaces an earlier one, but a finished text is final. A last line that was not written to its end (a
killed process, a full disk) does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

_MARK, _FORMAT = "specdec_journal", 1
_BEGINNING = f'{{"{_MARK}": '.encode()  # of every journal


@dataclass(frozen=True, eq=False)
class Kept:
    """What a journal keeps of a text.

    Args:
        tokens: [length] int64: the new tokens.
        step: how many steps it had taken when it was interrupted; None if it is finished.
        columns: one number per token under each name, such as log-probabilities: [length] float64.
    """

    tokens: np.ndarray
    step: int | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Entries:
    """What a journal holds, by the place of each text in the job.

    Args:
        finished: texts that have ended.
        skipped: why prompts were skipped.
        in_hand: texts that an interrupt has left unfinished.
    """

    finished: dict[int, Kept] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    in_hand: dict[int, Kept] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a line in."""
        columns = dict(line)
        text, reason, step = columns.pop("text"), columns.pop("skipped", None), columns.pop("step", None)
        if text in self.finished:
            return
        for older in (self.skipped, self.in_hand):
            older.pop(text, None)
        if reason is not None:
            self.skipped[text] = reason
            return
        tokens = np.array(columns.pop("tokens"), np.int64)
        kept = Kept(tokens, step, {name: np.array(column, np.float64) for name, column in columns.items()})
        (self.finished if step is None else self.in_hand)[text] = kept


def first_line(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The line that a journal begins with."""
    return {_MARK: _FORMAT, "settings": dict(settings)}


def text_line(
    tokens: Sequence[int] | np.ndarray, columns: Mapping[str, Sequence[float] | np.ndarray]
) -> dict[str, Any]:
    """Tokens and columns as a line holds them."""
    line = {"tokens": np.asarray(tokens, np.int64).tolist()}
    for name, column in columns.items():
        line[name] = np.asarray(column, np.float64).tolist()
        if len(line[name]) != len(line["tokens"]):
            raise ValueError(
                f"{name} has {len(line[name])} numbers for {len(line['tokens'])} tokens; pass one for each."
            )
    return line


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Entries]:
    """The settings and the entries of a journal, which is left as it is: to look at, or to join the parts of a job.

    Raises:
        ValueError: it is no journal, or a line other than the last one is damaged.
    """
    with open(path, "rb") as file:
        settings, entries, _ = read_from(file, os.fspath(path))
    if settings is None:
        raise ValueError(f"the journal {os.fspath(path)} is empty; run the job that writes it first.")
    return settings, entries


def read_from(file: BinaryIO, path: str) -> tuple[dict[str, Any] | None, Entries, int]:
    """The settings, None if the file is empty; the entries; and how many bytes of the file count."""
    settings, entries, size = None, Entries(), 0
    for number, (data, line) in enumerate(_lines(file, path), start=1):
        try:
            if number > 1:
                entries.add(line)
            elif line[_MARK] == _FORMAT:
                settings = line["settings"]
            else:
                raise ValueError(f"it has format {line[_MARK]}, and this version of specdec writes format {_FORMAT}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, number, error) from error
        size += len(data)
    return settings, entries, size


def _lines(file: BinaryIO, path: str) -> Iterator[tuple[bytes, Any]]:
    """The lines that count, each with its value: all but a last one that is broken."""
    broken: tuple[int, ValueError] | None = None
    for number, data in enumerate(file, start=1):
        if number == 1 and not data.startswith(_BEGINNING[: len(data)]):
            raise ValueError(f"{path} is not a journal; pass the path of one, or of a file that is not there yet.")
        if broken is not None:
            raise _damaged(path, *broken)
        try:
            value = json.loads(data)
        except ValueError as error:
            broken = number, error
            continue
        if data.endswith(b"\n"):
            yield data, value


def _damaged(path: str, number: int, error: Exception) -> ValueError:
    cure = "remove that line, and its text is written again" if number > 1 else "pass another path"
    return ValueError(f"line {number} of the journal {path} cannot be read ({error}); {cure}.")
