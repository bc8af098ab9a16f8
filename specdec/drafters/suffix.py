"""Drafts from the text itself by the statistics of its suffixes (SuffixDecoding, Oliaro et al., arXiv:2411.04975).

Each row's text is in a suffix automaton, alone or with the other texts of its prompt, which grows in amortised constant time
per token; and the row has a place in the automaton of an optional corpus. What followed the longest suffix that was continued
before becomes a tree, best path first, as deep and as wide as the counts are clear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from heapq import heappop, heappush

from torch import Tensor

from specdec.batch import Batch
from specdec.checks import as_float, as_int, as_ints, as_tuple, check_flag, put_size
from specdec.drafters.base import Drafter, DraftRun
from specdec.drafters.points import Point, PointRun
from specdec.drafters.suffix_automaton import SuffixAutomaton
from specdec.drafters.suffix_memory import Memory, Texts
from specdec.laws import Law
from specdec.models.target import TargetRun
from specdec.outcome import Outcome
from specdec.sampling import Sampling
from specdec.tree import TreeSpec


class SuffixDrafter(Drafter):
    """Trees of what followed the longest repeated suffix, in the text and in a corpus; POINT children.

    >>> drafter = SuffixDrafter(shared=True)  # several samples of each prompt, epoch after epoch
    >>> for epoch in range(3):
    ...     specdec.generate(target, prompts, drafter, sampling=Sampling(1.0), seed=epoch)

    What texts like those to come have said can be drafted from the first token on:

    >>> drafter = SuffixDrafter(corpus=[tokenizer(text)["input_ids"] for text in documents])

    Lossless also with `shared`: a draft is made of tokens that were committed before any coin of this step was drawn, and by
    other coins. Given the drafts of a step, its tokens therefore have the target's law, and so has the text; texts of several
    rows, or calls, are as independent as without a draft. This needs coins that no remembered text was drawn by: a call that
    samples with the seed of an earlier one is refused. Which drafts there are does depend on the rows beside it: a seed gives
    one text of that law, but another one among other rows, in other batches or after other calls.

    Args:
        nodes: most nodes, the root included.
        depth: longest path.
        width: most children of a node.
        threshold: a node is drafted while the estimated probability of its whole path is at least this.
        corpus: texts to draft from besides the row's own, as token ids.
        shared: whether to draft also from what other rows, and earlier calls, have written after the same prompt. They are kept
            in `memory`, for the life of the drafter or until `drafter.memory.clear()`.
        remembered: most tokens that the memory keeps, of about 0.5 KB each; prompts begun longest ago are forgotten first.
    """

    def __init__(
        self,
        nodes: int = 17,
        depth: int = 12,
        width: int = 3,
        threshold: float = 0.15,
        corpus: Sequence[Tensor | Sequence[int]] = (),
        shared: bool = False,
        remembered: int = 2**18,
    ):
        self.nodes, self.depth, self.width = nodes, depth, width
        put_size(self)
        self.threshold = as_float("threshold", threshold, "(0, 1]")
        check_flag("shared", shared)
        self.shared, self.memory = shared, Memory(as_int("remembered", remembered, 1))
        self.corpus = SuffixAutomaton()
        for i, text in enumerate(as_tuple("corpus", corpus, "texts, each a sequence of token ids")):
            self.corpus.write(0, as_ints(f"corpus[{i}]", text, 0, cure="texts are token ids"))

    def __repr__(self) -> str:
        sizes = f"nodes={self.nodes}, depth={self.depth}, width={self.width}, threshold={self.threshold}"
        corpus = f", corpus=<{self.corpus.tokens} tokens>" if self.corpus.tokens else ""
        return f"SuffixDrafter({sizes}{corpus}{', shared=True' if self.shared else ''})"

    def spec(self, sampling: Sampling) -> TreeSpec:
        laws = frozenset({Law.POINT})
        return TreeSpec(laws, self.nodes, self.depth, self.width, by_depth=True, by_row=not self.shared)

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        return last if last and last.batch is batch else _SuffixRun(self, batch)


class _SuffixRun(PointRun):
    drafter: SuffixDrafter

    def __init__(self, drafter: SuffixDrafter, batch: Batch):
        super().__init__(drafter, batch)
        self._lock = drafter.memory.lock if drafter.shared else nullcontext()
        self._texts = [Texts(())] * len(batch)  # those that each row's text is one of
        self._states = [0] * len(batch)  # of each row's text in their automaton
        self._places = [(0, 0)] * len(batch)  # (state, length) of each row in the corpus

    def enter(self, rows: list[int]) -> None:
        memory, texts = self.drafter.memory, self.batch.texts
        with self._lock:
            for b in rows:
                text, writes = texts[b].tolist(), self.batch.host_left[b] > 0
                prompt, written = text[: self.batch.prompts[b]], text[self.batch.prompts[b] :]
                self._texts[b] = memory.begin(self.batch, b) if self.drafter.shared and writes else Texts(prompt)
                self._states[b], self._places[b] = self._texts[b].go_on(written), (0, 0)
                self._find(b, text)
            memory.forget()

    def points(self) -> list[list[Point]]:
        depths = (min(self.drafter.depth, left - 1) for left in self.batch.host_left)
        with self._lock:
            return [list(self._grow(*self._match(b), deepest)) for b, deepest in enumerate(depths)]

    def commit(self, outcome: Outcome) -> None:
        # A step that the loop is about to refuse leaves tokens that may be none.
        if any(outcome.invalid):
            return
        with self._lock:
            for b, tokens in enumerate(outcome.emitted):
                if tokens and self.batch.sampling.temperature:  # greedy texts are drawn with no coins
                    self._texts[b].keys.add(self.batch.keys[b])
                self._states[b] = self._texts[b].automaton.write(self._states[b], tokens)
                self._find(b, tokens)

    def _find(self, row: int, tokens: Iterable[int]) -> None:
        """Follow the corpus by new tokens of a row."""
        for token in tokens:
            self._places[row] = self.drafter.corpus.read(*self._places[row], token)

    def _match(self, row: int) -> tuple[SuffixAutomaton, int, int]:
        """(automaton, state, length) of the longest suffix that was continued before, in these texts or else in the corpus."""
        own = self._texts[row].automaton
        state = own.continued(self._states[row])
        length = own.length[state]
        return (self.drafter.corpus, *self._places[row]) if self._places[row][1] > length else (own, state, length)

    def _grow(self, automaton: SuffixAutomaton, state: int, length: int, deepest: int) -> Iterator[Point]:
        """The nodes after the root, the best path first."""
        if state <= 0 or deepest < 1:
            return
        made, heap = 0, []
        self._consider(heap, automaton, state, length, 1.0, 0, 0)
        while heap and made < self.drafter.nodes - 1:
            minus_chance, _, parent, depth, token, state = heappop(heap)
            made += 1
            yield Point(token, parent, -minus_chance)
            if depth < deepest:
                self._consider(heap, automaton, state, length + depth, -minus_chance, made, depth)

    def _consider(self, heap, automaton, state, length, chance, parent, depth) -> None:
        """Push the likeliest children of a node. A child seen once, after a context of length 1, is estimated at 1/2."""
        ways = [(automaton.count[to], -token, to) for token, to in automaton.next[state].items()]
        seen = sum(count for count, _, _ in ways)
        for count, token, to in sorted(ways, reverse=True)[: self.drafter.width]:
            estimate = chance * count / (seen + 1 / length)
            if estimate >= self.drafter.threshold:
                heappush(heap, (-estimate, len(heap), parent, depth + 1, -token, to))
