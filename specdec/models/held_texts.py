"""Which texts the rows of a cache hold the beginnings of, so that other texts can go on from what was read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from specdec.batch import common_length
from specdec.models.cache import Source, TreeCache

_NOTHING = np.empty(0, np.int64)


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
        return Source(cache, row, cache.reaches(count, wanted))


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
