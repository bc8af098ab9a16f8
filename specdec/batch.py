"""The texts of a run, on the device and on the host. They are kept nowhere else."""

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
    from specdec.arguments import Request


class Batch:
    """The texts so far, as drafters, tree policies and targets read them. Only the loop writes to it.

    Device:
        tokens: [batch, capacity] int64: prompts and committed tokens; anything from `lengths` on.
        lengths: [batch] int64: committed tokens of each row. The last of them is the root, which no model has read yet.
        left: [batch] int64: tokens that each row may still emit; 0 when it has ended. A node at depth d is of use to
            rows with left > d, as the target's own token follows the last drafted one.

    Host, as of the last step:
        texts: the committed tokens of each row, a 1-D int64 array each.
        host_lengths, host_left: `lengths` and `left`.
        keys: (seed, index) of each row's coins: where both are equal, so are the coins.
        longest: upper bound on `lengths`, rounded up where stages are captured; those may depend on no other length.
        max_depth: longest path that a drafter may propose now.

    Settings of the run:
        vocab: size of the target's vocabulary.
        sampling, stop_tokens, tokenizer: as given to `generate`, with defaults filled in.
        processors: each row's logits processors, in their state after the text so far.
        max_length: tokens that the longest row may grow to, the prompt included.
        static: whether steps are captured, so that drafters use no host values but `longest`.
        stages: what runs the stages of a step; a drafter may have its scores captured by it.
        keep: whether a later turn may go on from this run, so that models note what they have read.
        resume: whether to go on from what an earlier turn has read.
    """

    def __init__(self, rows: int, capacity: int, vocab: int, device: torch.device):
        self.tokens = torch.zeros((rows, capacity), dtype=torch.int64, device=device)
        self.lengths, self.left = torch.zeros((2, rows), dtype=torch.int64, device=device)
        self.vocab, self.sampling = vocab, Sampling()
        self.stop_tokens: tuple[int, ...] = ()
        self.tokenizer: Any = None
        self.processors: Sequence[Processors] = [Processors()] * rows
        self._chains: dict[int, Topology] = {}

    def begin(self, request: Request, stages: Stages) -> None:
        """Write the prompts, and note the settings of a run."""
        self.sampling, self.processors = request.sampling, request.processors
        self.stop_tokens, self.tokenizer, self.stages = request.stop_tokens, request.tokenizer, stages
        self.static, self.keep, self.resume = request.static, request.keep, request.last is not None
        self._deepest, self.max_length = request.spec.depth, request.longest
        # seeds are integers of 64 bits, with a sign or without
        self.keys = [(request.seed % 2**64, request.first_index + b) for b in range(len(self))]
        self.host_lengths = list(map(len, request.prompts))
        # New: what an earlier run has read is told from its own. -1, which is no token, where none is noted: a run that fails
        # in a step has read more than it notes.
        self._host = np.full(self.tokens.shape, -1, np.int64)
        for row, prompt in zip(self._host, request.prompts, strict=True):
            row[: len(prompt)] = prompt
        self.tokens.copy_(torch.from_numpy(self._host).clamp(min=0))
        self.lengths.copy_(torch.tensor(self.host_lengths))
        self.left.copy_(torch.tensor(request.budgets))
        self.note_left(list(request.budgets))

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
    def texts(self) -> list[np.ndarray]:
        return [row[:n] for row, n in zip(self._host, self.host_lengths, strict=True)]

    @property
    def records(self) -> list[np.ndarray]:
        """[capacity] int64 each: the buffers that `texts` are views of. No later run writes to them."""
        return list(self._host)

    @property
    def root(self) -> Tensor:
        """[batch] int64: the last committed tokens."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]

    @property
    def longest(self) -> int:
        return self.stages.rounded(max(self.host_lengths))

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
        for b, tokens in enumerate(outcome.emitted):
            start = self.host_lengths[b]
            self.host_lengths[b] = start + len(tokens)
            self._host[b, start : start + len(tokens)] = tokens
        self.note_left(outcome.left)

    def note_left(self, left: list[int]) -> None:
        """Set what each row may still emit, and how deep drafts may therefore be."""
        self.host_left = left
        # Smallest budget of a running row. Captured steps cannot branch on it: 0 makes them compare every budget.
        self._least = 0 if self.static else min((n for n in left if n), default=0)
        self.max_depth = self._deepest if self.static else min(self._deepest, max(left) - 1)

    def end(self, row: int) -> None:
        """End a row: it emits nothing more."""
        self.left[row] = 0
        self.note_left([0 if b == row else n for b, n in enumerate(self.host_left)])
