"""Suffix automata (Blumer et al. 1985) of several texts that grow at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_LINKS = 32  # most suffixes counted per token: a text that repeats one token has as many suffixes as tokens


class SuffixAutomaton:
    """All substrings of some texts, and how often each occurred.

    A state is a class of substrings; state 0 is the empty one. Whoever writes a text keeps its state: texts grow in any order,
    each from state 0 or from the state of a text that it goes on from, which is then counted once. A token takes amortised
    constant time, counted over the whole of each text (for texts that branch: Mohri, Moreno and Weinstein 2009).

    Attributes:
        next: from each state and token to the state of the strings with that token; tokens that occurred.
        link: from each state to that of its longest suffix that also occurred elsewhere; -1 from state 0.
        length: of each state's longest string.
        count: how often each state's strings occurred.
        tokens: how many were read.
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.count, self.tokens = [-1], [0], [0], 0

    def write(self, state: int, tokens: Iterable[int]) -> int:
        """Append tokens to the text of this state; 0 begins a text. Returns the text's new state."""
        for token in tokens:
            state = self._extend(state, token)
        return state

    def follow(self, state: int, tokens: Sequence[int]) -> tuple[int, int]:
        """How far the text of this state was continued so before: the state there, and the number of tokens."""
        for known, token in enumerate(tokens):
            if token not in self.next[state]:
                return state, known
            state = self._longest(state, token)
        return state, len(tokens)

    def read(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Follow another text by one token.

        `state` and `length` are those of its longest suffix that occurs here. Returns those of the text with `token`.
        """
        while state > 0 and token not in self.next[state]:
            state = self.link[state]
            length = self.length[state]
        return (self.next[state][token], length + 1) if token in self.next[state] else (0, 0)

    def continued(self, state: int) -> int:
        """The state of the longest suffix of this state's text that some text continued; 0 if there is none."""
        while state > 0 and not self.next[state]:
            state = self.link[state]
        return state

    def _extend(self, last: int, token: int) -> int:
        # Where another text went on in the same way, the text shares its state.
        new = self._longest(last, token) if token in self.next[last] else self._added(last, token)
        self.tokens += 1
        state, seen = new, 0
        while state > 0 and seen < _LINKS:
            self.count[state] += 1
            state, seen = self.link[state], seen + 1
        return new

    def _added(self, last: int, token: int) -> int:
        """A new state, for the text of state `last` followed by `token`."""
        new, state = self._state({}, self.length[last] + 1, 0), last
        while state >= 0 and token not in self.next[state]:
            self.next[state][token] = new
            state = self.link[state]
        self.link[new] = 0 if state < 0 else self._longest(state, token)
        return new

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
