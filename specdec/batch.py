"""The texts that a run works on, on the device and on the host. While it does, they are kept nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specdec.engines.base import Stages
from specdec.laws import Law
from specdec.outcome import Outcome
from specdec.processors import Processors
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Topology, chain

if TYPE_CHECKING:
    from specdec.request import Request, Text


class Batch:
    """The texts so far, as drafters, tree policies and targets read them. Only the loop, and what fills rows
    (`slots`, `runs`), write to it.

    A row holds one text until that has ended, and then perhaps another.

    Device:
        tokens: [batch, capacity] int64: prompts and committed tokens; anything from `lengths` on.
        lengths: [batch] int64: committed tokens of each row. The last of them is the root, which no model has read yet.
        left: [batch] int64: tokens that each row may still emit; 0 when it has ended, or while its prompt is being read. A node
            at depth d is of use to rows with left > d, as the target's own token follows the last drafted one.

    Host, as of the last step:
        texts: the committed tokens of each row, a 1-D int64 array each.
        host_lengths, host_left: `lengths` and `left`.
        waiting: whether texts wait for a row.
        seconds: how long the step took.
        gained: tokens by which it brought the run nearer to its end: of the row with most to come; while texts wait, the mean
            of all rows that were running.
        keys: (seed, `Text.key`) of each row's coins: where both are equal, so are the coins.
        prompts: how many of each row's tokens are its prompt; the others were written.
        longest: upper bound on `lengths`; where stages are captured the same in all steps, as those may depend on no length.
        max_depth: longest path that a drafter may propose now.

    Settings of the run:
        vocab: size of the target's vocabulary.
        sampling, stop_tokens, tokenizer: as given to `generate`, with defaults filled in.
        processors: each row's logits processors, in their state after the text so far.
        max_length: tokens that the longest text may grow to, the prompt included.
        static: whether steps are captured, so that drafters use no host values but `longest`.
        compiles: whether forward passes of steps are compiled.
        stages: what runs the stages of a step; a drafter may have its scores captured by it.
        keep: whether a later turn, or a smaller batch, may go on from this run, so that models note what they have read.
        resume: whether to go on from what an earlier turn, or a larger batch, has read; off once a text has entered.
    """

    def __init__(self, rows: int, capacity: int, vocab: int, device: torch.device):
        self.tokens = torch.zeros((rows, capacity), dtype=torch.int64, device=device)
        self.lengths, self.left = torch.zeros((2, rows), dtype=torch.int64, device=device)
        self.vocab, self.sampling = vocab, Sampling()
        self.stop_tokens: tuple[int, ...] = ()
        self.tokenizer: Any = None
        self.processors: list[Processors] = [Processors()] * rows
        self._chains: dict[int, Topology] = {}
        # -1, which is no token, where none is noted: a run that fails in a step has read more than it notes.
        self._host = [np.full(capacity, -1, np.int64)] * rows
        self.host_lengths, self.host_left = [0] * rows, [0] * rows
        self.keys, self.prompts = [(0, 0)] * rows, [0] * rows
        self.waiting, self.seconds, self.gained = False, 0.0, 0.0
        self.stages = Stages()

    def begin(self, request: Request, texts: Sequence[Text], longest: int, resume: bool = False) -> None:
        """Note the settings of a run whose texts may grow to `longest` tokens, and begin a text in every row."""
        self.sampling, self.stop_tokens, self.tokenizer = request.sampling, request.stop_tokens, request.tokenizer
        self.static, self._deepest, self.max_length = request.static, request.spec.depth, longest
        self.compiles, self._room, self.resume = request.engine.compiles, request.engine.room(longest), resume
        self.stages.begin()
        self.keep = request.keep or request.slots is not None  # the halves of a batch go on from it
        self._seed = request.seed % 2**64  # seeds are integers of 64 bits, with a sign or without
        for row, text in enumerate(texts):
            self.enter(row, text)

    def enter(self, row: int, text: Text, length: int | None = None) -> None:
        """Begin a text in a row; if a length is given, only so much of it, which nothing is added to for now."""
        whole = length is None or length == len(text.tokens)
        tokens = text.tokens[:length]
        # A new array: what models have read of the row's last text is told from the old one.
        self._host[row] = host = np.full(self.capacity, -1, np.int64)
        host[: len(tokens)] = tokens
        self.tokens[row].copy_(torch.from_numpy(host.clip(0)))
        self.processors[row] = text.processors if whole else Processors()
        left = text.left if whole else 0
        self.lengths[row], self.host_lengths[row] = len(tokens), len(tokens)
        self.left[row], self.keys[row], self.prompts[row] = left, (self._seed, text.key), text.prompt
        self._note_left([left if b == row else n for b, n in enumerate(self.host_left)])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self.tokens.shape[1]

    @property
    def largest_tree(self) -> int:
        """Nodes that a row has room for behind the longest text."""
        return self.capacity - self._room

    def text(self, row: int) -> np.ndarray:
        """[length] int64: the committed tokens of one row, which is `texts[row]`."""
        return self._host[row][: self.host_lengths[row]]

    @property
    def texts(self) -> list[np.ndarray]:
        return [self.text(row) for row in range(len(self))]

    @property
    def records(self) -> list[np.ndarray]:
        """[capacity] int64 each: the buffers that `texts` are views of. No later text is written to them."""
        return list(self._host)

    @property
    def root(self) -> Tensor:
        """[batch] int64: the last committed tokens."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]

    @property
    def longest(self) -> int:
        return self._room if self.stages.captures else max(self.host_lengths)

    @property
    def processed(self) -> bool:
        """Whether logits processors change any row's scores."""
        return any(self.processors)

    def chain(self, nodes: int) -> Topology:
        """The chain of so many nodes. It stays the same tensor for the whole run, as captured graphs read it in place."""
        if nodes not in self._chains:
            self._chains[nodes] = chain(len(self), nodes, self.device)
        return self._chains[nodes]

    def undrafted(self) -> DraftTree:
        """Trees of the root alone."""
        return DraftTree(self.root[:, None], self.chain(1), torch.zeros_like(self.tokens[:, :1], dtype=torch.uint8))

    def within_budgets(self, tree: DraftTree) -> DraftTree:
        """Remove nodes beyond a row's own budget: its text must not depend on the budgets of other rows."""
        if self._least > tree.topology.depth:
            return tree
        beyond = tree.topology.depths >= self.left[:, None].clamp(min=1)
        return replace(tree, laws=torch.where(beyond, Law.PADDING, tree.laws))

    def append(self, outcome: Outcome) -> None:
        """Append a step's tokens to the texts on the device."""
        tokens = outcome.tokens
        place = torch.arange(tokens.shape[1], device=tokens.device)
        self.tokens.scatter_(1, self.lengths[:, None] + place, tokens)
        self.lengths += outcome.keep
        self.left.copy_(outcome.left_after)

    def note(self, outcome: Outcome) -> None:
        """Append them to the texts on the host, which waits for the device."""
        news = [len(tokens) for tokens in outcome.emitted if tokens]
        nearer = max(self.host_left) - max(outcome.left)
        self.gained = sum(news) / max(len(news), 1) if self.waiting else nearer
        for b, tokens in enumerate(outcome.emitted):
            start = self.host_lengths[b]
            self.host_lengths[b] = start + len(tokens)
            self._host[b][start : start + len(tokens)] = tokens
        self._note_left(outcome.left)

    def _note_left(self, left: list[int]) -> None:
        """Set what each row may still emit, and how deep drafts may therefore be."""
        self.host_left = left
        # Smallest budget of a running row. Captured steps cannot branch on it: 0 makes them compare every budget.
        self._least = 0 if self.static else min((n for n in left if n), default=0)
        self.max_depth = self._deepest if self.static else min(self._deepest, max(left) - 1)

    def end(self, row: int) -> None:
        """End a row: it emits nothing more."""
        self.left[row] = 0
        self._note_left([0 if b == row else n for b, n in enumerate(self.host_left)])


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts, [length] int64 each, have in common from their beginnings on."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
