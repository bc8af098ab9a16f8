"""What rows of one prompt have written, for each other and for later runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from specdec.batch import Batch
from specdec.drafters.suffix_automaton import SuffixAutomaton


class Texts:
    """Texts that begin with one prompt, in one automaton.

    Attributes:
        automaton: of all of them. Each row keeps the state of its own text.
        keys: of the coins that drew them, of those that were sampled: see `Batch.keys`.
    """

    def __init__(self, prompt: Iterable[int]):
        self.automaton, self.keys = SuffixAutomaton(), set[tuple[int, int]]()
        self._prompt = self.automaton.write(0, prompt)

    def go_on(self, written: Sequence[int]) -> int:
        """The state of the text that continues the prompt so; what is new of it is written."""
        state, known = self.automaton.follow(self._prompt, written)
        return self.automaton.write(state, written[known:])


class Memory:
    """The texts of every prompt, over all runs of one drafter. It is the one thing that a drafter keeps over runs.

    A prompt is what a text begins with: in a conversation, all turns so far. Texts are remembered token by token, so those of a
    run that failed too.

    Args:
        most: tokens that are kept, prompts included; a token takes about 0.5 KB. Prompts that were begun with longest ago are
            forgotten first. The rows at work keep theirs to their end, and as many tokens as they write then.

    Attributes:
        lock: held by whoever reads or writes texts; runs in several threads take turns.
    """

    def __init__(self, most: int):
        self.most, self.lock = most, threading.Lock()
        self._texts: dict[tuple[int, bytes], Texts] = {}  # by vocabulary and prompt, the newest last

    @property
    def tokens(self) -> int:
        """How many it holds."""
        return sum(texts.automaton.tokens for texts in self._texts.values())

    def clear(self) -> None:
        """Forget everything. Rows at work keep what they have."""
        with self.lock:
            self._texts.clear()

    def begin(self, batch: Batch, row: int) -> Texts:
        """The texts with the prompt of this row, whose own joins them.

        Raises:
            ValueError: one of them was drawn with the coins of this row. A draft and what decides about it would then be drawn
                by the same coins, and the text would not have the target's law.
        """
        prompt = batch.text(row)[: batch.prompts[row]]
        name = batch.vocab, prompt.tobytes()
        texts = self._texts.pop(name, None) or Texts(prompt.tolist())
        self._texts[name] = texts
        begins = len(prompt) == batch.host_lengths[row]  # else a text goes on that had these coins before
        if begins and batch.keys[row] in texts.keys:
            raise ValueError(
                f"seed={batch.keys[row][0]}: a text that this seed drew for the same prompt and sample is remembered, and may "
                "not be drafted from by the same coins. Pass another seed in every call (seed=epoch); to go on with a journal, "
                "or to repeat a call, forget all before: drafter.memory.clear()."
            )
        return texts

    def forget(self) -> None:
        """Forget prompts, the oldest first, until no more tokens are left than it may keep."""
        held = self.tokens
        while held > self.most:
            held -= self._texts.pop(next(iter(self._texts))).automaton.tokens
