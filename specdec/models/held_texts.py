"""Which texts the rows of a cache hold the beginnings of, so that other texts can go on from what was read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from specdec.batch import common_length
from specdec.models.cache import Source, TreeCache

_NOTHING = np.empty(0, np.int64)

# A row waits for another that is read before it if it can then copy so many tokens more: fewer are read as fast as copied.
_WORTH_WAITING = 32


class Held(NamedTuple):
    """What a row of a cache holds.

    Args:
        source: its slots.
        tokens: [slots + ahead] int64: the tokens that these were computed from.
    """

    source: Source
    tokens: np.ndarray

    def beginning(self, text: np.ndarray, most: int) -> Source:
        """The slots, at most so many, that are those of this text too."""
        ahead = len(self.tokens) - self.source.count
        wanted = max(min(common_length(self.tokens, text) - ahead, most), 0)
        cache, row, count = self.source.cache, self.source.row, self.source.count
        return Source(cache, row, cache.reaches(row, count, wanted))


class HeldTexts:
    """The texts that the rows of a cache hold the beginnings of.

    Args:
        cache: the cache.
        ahead: how many tokens after its own a slot was computed from.
    """

    def __init__(self, cache: TreeCache, ahead: int = 0):
        self._cache, self._ahead = cache, ahead
        self._texts = [_NOTHING] * len(cache.lengths)

    def note(self, row: int, text: np.ndarray) -> None:
        """A row begins with this text [capacity] int64, which may be added to in place."""
        self._texts[row] = text

    def forget(self, rows: Iterable[int]) -> None:
        for row in rows:
            self._texts[row] = _NOTHING

    def __iter__(self) -> Iterator[Held]:
        """The rows that hold something."""
        for row, (text, slots) in enumerate(zip(self._texts, self._cache.lengths.tolist(), strict=True)):
            if slots and len(text):
                yield Held(Source(self._cache, row, slots), text[: slots + self._ahead])


def longest_beginning(held: Iterable[Held], own: Source, text: np.ndarray, most: int) -> Source:
    """The longest beginning of a text that some row holds, at most so many slots; of equals that in the row of `own`."""
    found = [own, *(one.beginning(text, most) for one in held)]
    return max(found, key=lambda source: (source.count, (source.cache, source.row) == (own.cache, own.row)))


@dataclass
class Entry:
    """A text that is being read into a row.

    Args:
        text: [length] int64.
        goal: how many of its tokens are to be read.
        most: how many of them may be copied from where they were read before.
        mark: how many come before the place where a recurrent state is kept; 0 if none is.
    """

    text: np.ndarray
    goal: int
    most: int
    mark: int


def next_readings(
    cache: TreeCache, entries: Mapping[int, Entry], held: Iterable[Held]
) -> tuple[dict[int, Source], dict[int, int]]:
    """(what each row begins with that is read next, how many of its tokens it then has), for some rows of `entries`.

    Rows that can soon copy much of another are left for later. Recurrent states can be copied only where reading stops, so that
    the other stops where they part.
    """
    held = [*held]
    sources: dict[int, Source] = {}
    stops: dict[int, int] = {}
    beginnings: dict[bytes, list[int]] = {}  # rows of `sources` by their first tokens
    for row, entry in entries.items():
        best = longest_beginning(held, Source(cache, row, 0), entry.text, entry.most)
        same = beginnings.setdefault(entry.text[:_WORTH_WAITING].tobytes(), [])
        shared = {
            other: min(common_length(entries[other].text, entry.text), entries[other].goal, entry.most)
            for other in same
        }
        # one that goes on from behind the place where they part cannot stop there
        before = [other for other in same if shared[other] >= sources[other].count]
        nearest = max(before, key=lambda other: shared[other], default=None)
        if nearest is None or shared[nearest] < best.count + _WORTH_WAITING:
            sources[row] = best
            stops[row] = entry.mark if best.count < entry.mark < entry.goal else entry.goal
            same.append(row)
        elif cache.recurrent:
            stops[nearest] = min(stops[nearest], shared[nearest])
    return sources, stops
