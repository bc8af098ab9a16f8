"""Drafts from the text itself by the statistics of its suffixes (SuffixDecoding, Oliaro et al., arXiv:2411.04975).

Each row has a suffix automaton of its text, which grows with it in amortised constant time per token (Blumer et al. 1985), and
a place in the automaton of an optional corpus. The continuations of the longest suffix that occurred before become a tree, best
path first, as deep and as wide as their counts are clear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush

import numpy as np
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import as_float, as_ints, as_tuple, put_size
from specdec.coins import Coins
from specdec.drafters.base import Drafter, DraftRun
from specdec.laws import Law
from specdec.models.target import TargetRun
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec, tree_of_points

_LINKS = 32  # most suffixes counted per token: a text that repeats one token has as many suffixes as tokens


class SuffixAutomaton:
    """All substrings of a text and how often each occurred. A state is a class of substrings; state 0 is the empty one."""

    def __init__(self, tokens: Iterable[int] = ()):
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.count, self.last = [-1], [0], [0], 0
        for token in tokens:
            self.extend(token)

    def extend(self, token: int) -> None:
        """Append one token."""
        new = self._state({}, self.length[self.last] + 1, 0)
        state = self.last
        while state >= 0 and token not in self.next[state]:
            self.next[state][token] = new
            state = self.link[state]
        self.link[new] = 0 if state < 0 else self._longest(state, token)
        self.last, seen = new, 0
        while new > 0 and seen < _LINKS:
            self.count[new] += 1
            new, seen = self.link[new], seen + 1

    def read(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Follow another text by one token.

        `state` and `length` are those of its longest suffix that occurs here. Returns those of the text with `token`.
        """
        while state > 0 and token not in self.next[state]:
            state = self.link[state]
            length = self.length[state]
        return (self.next[state][token], length + 1) if token in self.next[state] else (0, 0)

    def _state(self, following: dict[int, int], length: int, count: int) -> int:
        self.next.append(following)
        self.link.append(-1)
        self.length.append(length)
        self.count.append(count)
        return len(self.link) - 1

    def _longest(self, state: int, token: int) -> int:
        """The state of the longest string of `state` followed by `token`. If longer strings share it, it is split off."""
        found = self.next[state][token]
        if self.length[found] == self.length[state] + 1:
            return found
        clone = self._state(dict(self.next[found]), self.length[state] + 1, self.count[found])
        self.link[clone], self.link[found] = self.link[found], clone
        while state >= 0 and self.next[state].get(token) == found:
            self.next[state][token] = clone
            state = self.link[state]
        return clone


class SuffixDrafter(Drafter):
    """Trees of what followed the longest repeated suffix, in the text and in a corpus; POINT children.

    Args:
        nodes: most nodes, the root included.
        depth: longest path.
        width: most children of a node.
        threshold: a node is drafted while the estimated probability of its whole path is at least this.
        corpus: texts to draft from besides the row's own, as token ids.
    """

    def __init__(
        self,
        nodes: int = 17,
        depth: int = 12,
        width: int = 3,
        threshold: float = 0.15,
        corpus: Sequence[Tensor | Sequence[int]] = (),
    ):
        self.nodes, self.depth, self.width = nodes, depth, width
        put_size(self)
        self.threshold = as_float("threshold", threshold, "(0, 1]")
        self.corpus = SuffixAutomaton()
        for i, text in enumerate(as_tuple("corpus", corpus, "texts, each a sequence of token ids")):
            # Each text ends in a token that no text has, so that no substring runs on into the next text.
            for token in (*as_ints(f"corpus[{i}]", text, 0, cure="texts are token ids"), -1 - i):
                self.corpus.extend(token)

    def __repr__(self) -> str:
        return f"SuffixDrafter(nodes={self.nodes}, depth={self.depth}, width={self.width}, threshold={self.threshold})"

    def spec(self, sampling: Sampling) -> TreeSpec:
        return TreeSpec(frozenset({Law.POINT}), self.nodes, self.depth, self.width, by_depth=True)

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        return last if last and last.batch is batch else _SuffixRun(self, batch)


class _SuffixRun(DraftRun):
    drafter: SuffixDrafter

    def __init__(self, drafter: SuffixDrafter, batch: Batch):
        super().__init__(drafter, batch)
        self._rows = [SuffixAutomaton()] * len(batch)  # the automaton of each row's text
        self._places = [(0, 0)] * len(batch)  # (state, length) of each row in the corpus
        self._read = [0] * len(batch)  # how many tokens of each row have been read into both

    def enter(self, rows: list[int]) -> None:
        for b in rows:
            self._rows[b], self._places[b], self._read[b] = SuffixAutomaton(), (0, 0), 0

    def propose(self, coins: Coins) -> DraftTree:
        batch, most = self.batch, self.drafter.depth
        self._read_on(batch.texts)
        depths = (min(most, left - 1) for left in batch.host_left)
        return tree_of_points(
            batch.root, [list(self._grow(*self._match(b), deepest)) for b, deepest in enumerate(depths)]
        )

    def _read_on(self, texts: Sequence[np.ndarray]) -> None:
        for b, text in enumerate(texts):
            for token in text[self._read[b] :].tolist():
                self._rows[b].extend(token)
                self._places[b] = self.drafter.corpus.read(*self._places[b], token)
            self._read[b] = len(text)

    def _match(self, row: int) -> tuple[SuffixAutomaton, int, int]:
        """(automaton, state, length) of the longest suffix that occurred before, in the row's text or else in the corpus."""
        own = self._rows[row]
        state = own.link[own.last]
        length = own.length[state] if state > 0 else 0
        return (self.drafter.corpus, *self._places[row]) if self._places[row][1] > length else (own, state, length)

    def _grow(self, automaton: SuffixAutomaton, state: int, length: int, deepest: int) -> Iterator[tuple[int, int]]:
        """(token, parent) of each node after the root, the best path first."""
        if state <= 0 or deepest < 1:
            return
        made, heap = 0, []
        self._consider(heap, automaton, state, length, 1.0, 0, 0)
        while heap and made < self.drafter.nodes - 1:
            minus_chance, _, parent, depth, token, state = heappop(heap)
            made += 1
            yield token, parent
            if depth < deepest:
                self._consider(heap, automaton, state, length + depth, -minus_chance, made, depth)

    def _consider(self, heap, automaton, state, length, chance, parent, depth) -> None:
        """Push the likeliest children of a node. A child seen once, after a context of length 1, is estimated at 1/2."""
        ways = [(automaton.count[to], -token, to) for token, to in automaton.next[state].items() if token >= 0]
        seen = sum(count for count, _, _ in ways)
        for count, token, to in sorted(ways, reverse=True)[: self.drafter.width]:
            estimate = chance * count / (seen + 1 / length)
            if estimate >= self.drafter.threshold:
                heappush(heap, (-estimate, len(heap), parent, depth + 1, -token, to))
