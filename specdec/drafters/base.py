"""The contract of a drafter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Never

import torch
from torch import Tensor

from specdec.coins import Coins
from specdec.engines.base import Engine
from specdec.processors import Processors
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec

if TYPE_CHECKING:
    from specdec.models.target import Target


@dataclass(eq=False)
class Context:
    """The batch as it stands: what a drafter may look at. Only the loop writes to it."""

    tokens: Tensor  # [batch, capacity] int64: prompt and committed tokens; garbage from `lengths` on
    lengths: Tensor  # [batch] int64: committed tokens of each row, the root (the last of them) included
    texts: list[list[int]]  # the committed tokens of each row on the host; lists of this run alone
    max_length: int  # tokens that the longest row may grow to, the prompt included
    max_depth: int  # longest path that can still be of use to any row
    # [batch] int64: depth still useful in each row, -1 if it has ended; deeper nodes are struck out (PADDING) by the loop
    row_depths: Tensor
    sampling: Sampling
    processors: Sequence[Processors]  # each row's logits processors, as they are after the text so far
    vocab: int  # size of the target's vocabulary
    host_row_depths: list[int] = field(default_factory=list)  # `row_depths` on the host, 0 for rows that have ended
    stop_tokens: tuple[int, ...] = ()  # that end a text
    tokenizer: Any = None
    engine: Engine = field(default_factory=Engine)
    resume: bool = False  # whether models are to begin in what is left of their last run
    fixed: bool = False  # steps are captured: use no host values but `longest`
    # [batch, hidden]: if `uses_hidden`, the target's last state before the root (running rows)
    hidden: Tensor | None = None

    @classmethod
    def empty(cls, batch: int, capacity: int, vocab: int, device: torch.device) -> Context:
        """Buffers for texts of at most `capacity` tokens."""
        lengths, row_depths = torch.zeros((2, batch), dtype=torch.int64, device=device)
        tokens = torch.zeros((batch, capacity), dtype=torch.int64, device=device)
        texts: list[list[int]] = [[] for _ in range(batch)]
        plain = [Processors()] * batch
        return cls(tokens, lengths, texts, capacity, 0, row_depths, Sampling(), plain, vocab)

    def begin(
        self,
        rows: Sequence[Tensor],
        max_length: int,
        sampling: Sampling,
        processors: Sequence[Processors],
        stop_tokens: tuple[int, ...],
        tokenizer: Any,
        engine: Engine,
        fixed: bool,
        resume: bool,
    ) -> None:
        """Write the prompts, 1-D int64 tensors, and note the settings of a run."""
        self.texts, self.max_length = [row.tolist() for row in rows], max_length
        self.sampling, self.processors, self.stop_tokens, self.tokenizer = sampling, processors, stop_tokens, tokenizer
        self.engine, self.fixed, self.resume = engine, fixed, resume
        self.tokens.zero_()
        for b, row in enumerate(rows):
            self.tokens[b, : len(row)] = row
        self.lengths.copy_(torch.tensor(self.host_lengths))

    @property
    def host_lengths(self) -> list[int]:
        """`lengths` on the host."""
        return [len(text) for text in self.texts]

    @property
    def root(self) -> Tensor:
        """[batch] int64: the last committed tokens."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]

    @property
    def processed(self) -> bool:
        """Whether logits processors change any row's scores."""
        return any(self.processors)

    @property
    def longest(self) -> int:
        """A bound on `lengths` that the host knows."""
        return self.engine.rounded(max(self.host_lengths))


class Report:
    """What the host is told of a step: read from the device when it is first asked for, once.

    Args:
        columns: [batch, depth + 7] int64: the tokens, count, accepted, tried and left of `Cut`, whether a visited law was
            invalid, whether the draft was.
    """

    def __init__(self, columns: Tensor):
        self.columns = columns

    @cached_property
    def _lists(self) -> tuple[list[list[int]], list[list[int]]]:
        *news, counts, accepted, tried, left, no_law, no_draft = self.columns.T.tolist()
        return news, [counts, accepted, tried, left, no_law, no_draft]

    @property
    def emitted(self) -> list[list[int]]:
        """Each row's new tokens."""
        news, (counts, *_) = self._lists
        return [list(row[:n]) for row, n in zip(zip(*news, strict=True), counts, strict=True)]

    @property
    def accepted(self) -> list[int]:
        """How many of those were drafted."""
        return self._lists[1][1]

    @property
    def tried(self) -> list[int]:
        """Deepest drafted depth of each row that was put to the test: accepted, or accepted + 1."""
        return self._lists[1][2]

    @property
    def left(self) -> list[int]:
        """Tokens that each row may still emit: 0 when it has ended."""
        return self._lists[1][3]

    @property
    def invalid(self) -> list[list[int]]:
        """Rows that had not ended in which the target gave no law, and those in which the draft cannot be right."""
        counts, *_, no_law, no_draft = self._lists[1]
        return [[b for b, n in enumerate(counts) if n and bad[b]] for bad in (no_law, no_draft)]


@dataclass(frozen=True, eq=False)
class Acceptance:
    """What became of a step, after stop tokens and budgets."""

    path: Tensor  # [batch, <= depth + 1] int64: accepted nodes, the root first; entries past `keep` are unused
    keep: Tensor  # [batch] int64: how many of them, from the root on, the text now contains; 0 for rows that had ended
    report: Report

    @property
    def emitted(self) -> list[list[int]]:
        """Each row's new tokens. This and what follows waits for the device."""
        return self.report.emitted

    @property
    def accepted(self) -> list[int]:
        """How many of those were drafted."""
        return self.report.accepted

    @property
    def stopped(self) -> list[bool]:
        """Rows that ended, now or earlier."""
        return [not n for n in self.report.left]


class Drafter(ABC):
    """Proposes a tree of continuations for every row, each step.

    Override `spec` and `propose`; `start` and `commit` if there is state to prepare or to follow. A drafter may be
    reused for any number of runs, one after the other: `start` begins a new one.
    """

    uses_hidden: bool = False  # True to have `context.hidden` filled
    # True if `propose` and `commit` do the same to the device every step: see `specdec.engines.graphs`
    capturable: bool = False
    run: object = None  # which run it drafts for; set by the loop

    @abstractmethod
    def spec(self, sampling: Sampling) -> TreeSpec:
        """What trees may be proposed under this sampling: checked against the rule once, before the first step."""

    def start(self, target: Target, context: Context) -> None:  # noqa: B027 - optional
        """Called once, when the prompts have been read. Raise ValueError with the cure if this pair cannot work."""

    @abstractmethod
    def propose(self, context: Context, coins: Coins) -> DraftTree:
        """Draft trees for the batch, no deeper than `context.max_depth`. Draw by `coins.picks` only.

        A node's number decides which coins are its own. So that a row's text does not depend on its batch, nodes deeper than
        `context.row_depths` must not take numbers before those of nodes that the row can use.
        """

    def commit(self, acceptance: Acceptance) -> None:  # noqa: B027 - optional
        """Called after every step with what was kept of the last proposal: nothing (`keep` is 0) of rows that had ended,
        and of rows for which another drafter drafted (`Fallback`), when `propose` may not even have been called.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Never:
        """Refused. It is here because `model.generate` ignores a `custom_generate` that cannot be called, in silence."""
        raise ValueError(
            f"a {type(self).__name__} is neither a decoding loop nor a function; to model.generate pass "
            "custom_generate=specdec.custom_generate(drafter), and where a function that makes one is wanted, that function."
        )

    def patched(self) -> AbstractContextManager[None]:
        """Entered around drafting and scoring, and again around following: for what drafting needs of a model of its own.

        What the target computes must stay as it is. To draft with the target's model in another state (an adapter switched
        off, say), change it inside `propose` and back before that returns, and keep a cache of its own for it.
        """
        return nullcontext()
