"""Prompt lookup: where a text repeats itself, copy what followed before (Saxena 2023; LLMA, arXiv:2304.04487)."""

from __future__ import annotations

import numpy as np

from specdec.batch import Batch
from specdec.checks import as_int
from specdec.drafters.base import Drafter, DraftRun
from specdec.drafters.points import Point, PointRun
from specdec.laws import Law
from specdec.models.target import TargetRun
from specdec.sampling import Sampling
from specdec.tree import TreeSpec


class NgramDrafter(Drafter):
    """Drafts what followed the most recent earlier occurrences of the last tokens, longest match first.

    Args:
        length: most tokens to draft from each occurrence.
        max_ngram: longest match to look for; shorter ones are tried down to a single token.
        branches: occurrences to draft from; tokens that their continuations share are drafted once.
    """

    def __init__(self, length: int = 8, max_ngram: int = 3, branches: int = 1):
        self.length, self.max_ngram = as_int("length", length, 1), as_int("max_ngram", max_ngram, 1)
        self.branches = as_int("branches", branches, 1)

    def __repr__(self) -> str:
        return f"NgramDrafter(length={self.length}, max_ngram={self.max_ngram}, branches={self.branches})"

    def spec(self, sampling: Sampling) -> TreeSpec:
        nodes = 1 + self.length * self.branches
        return TreeSpec(frozenset({Law.POINT}), nodes, self.length, self.branches, by_depth=True)

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        return last if last and last.batch is batch else _NgramRun(self, batch)


class _NgramRun(PointRun):
    drafter: NgramDrafter

    def enter(self, rows: list[int]) -> None:
        """Nothing is to be done, as nothing is kept of a text."""

    def points(self) -> list[list[Point]]:
        length, rows = self.drafter.length, zip(self.batch.texts, self.batch.host_left, strict=True)
        return [self._draft(text, min(length, left - 1)) for text, left in rows]

    def _draft(self, text: np.ndarray, length: int) -> list[Point]:
        """The continuations of `text` [length] as one tree, the latest first."""
        if length < 1:
            return []
        matched, ends = self._matches(text)
        chosen = ends[: -1 - self.drafter.branches : -1]
        index: dict[tuple[int, int], int] = {}  # from (token, parent) to the node
        chances: list[float] = []
        for end in chosen:
            parent = 0
            for depth, token in enumerate(text[end + 1 : end + 1 + length].tolist(), 1):
                parent = index.setdefault((token, parent), len(index) + 1)
                chances += [0.0] * (parent - len(chances))
                # A text that has gone on alike for n tokens goes on alike for one more in n of n + 1 cases, as in `suffix`.
                chances[parent - 1] += matched / (matched + depth) / len(chosen)
        return [Point(*node, chance) for node, chance in zip(index, chances, strict=True)]

    def _matches(self, text: np.ndarray) -> tuple[int, np.ndarray]:
        """The length of the longest repeated suffix of `text`, and the places where it ended before, in order."""
        ends = np.flatnonzero(text[:-1] == text[-1])  # earlier places of the last token; matches grow back from there
        for n in range(1, self.drafter.max_ngram):
            longer = ends[ends >= n]
            longer = longer[text[longer - n] == text[-1 - n]] if n < len(text) else longer[:0]
            if not len(longer):
                return n, ends
            ends = longer
        return self.drafter.max_ngram, ends
