"""The contract of a drafter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specdec.coins import Coins
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec

if TYPE_CHECKING:
    from specdec.target import Target


@dataclass(eq=False)
class Context:
    """The batch as it stands: what a drafter may look at. Only the loop writes to it."""

    tokens: Tensor  # [batch, capacity] int64: prompt and committed tokens; garbage from `lengths` on
    lengths: Tensor  # [batch] int64: committed tokens of each row, the root (the last of them) included
    host_lengths: list[int]  # the same numbers on the host
    max_length: int  # tokens that the longest row may grow to, the prompt included
    max_depth: int  # longest path that can still be of use to any row
    row_depths: Tensor  # [batch] int64: the same for each row; deeper nodes are struck out (PADDING) by the loop
    sampling: Sampling
    processors: list[tuple[Any, ...]]  # each row's logits processors
    vocab: int  # size of the target's vocabulary
    tokenizer: Any = None
    hidden: Tensor | None = (
        None  # [batch, hidden]: if `uses_hidden`, the target's last state before the root (running rows)
    )

    @property
    def root(self) -> Tensor:
        """[batch] int64: the last committed tokens."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]


@dataclass(frozen=True, eq=False)
class Acceptance:
    """What became of a step, after stop tokens and budgets."""

    path: Tensor  # [batch, <= depth + 1] int64: accepted nodes, the root first; entries past `keep` are unused
    keep: Tensor  # [batch] int64: how many of them, from the root on, the text now contains; 0 for rows that had ended
    emitted: list[list[int]]  # each row's new tokens
    accepted: list[int]  # how many of those were drafted
    stopped: list[bool]  # rows that ended, now or earlier


class Drafter(ABC):
    """Proposes a tree of continuations for every row, each step.

    Override `spec` and `propose`; `start` and `commit` if there is state to prepare or to follow. A drafter may be
    reused for any number of runs, one after the other: `start` begins a new one.
    """

    uses_hidden: bool = False  # True to have `context.hidden` filled
    run: Context | None = None  # the batch it drafts for; set by the loop

    @abstractmethod
    def spec(self, sampling: Sampling) -> TreeSpec:
        """What trees may be proposed under this sampling: checked against the rule once, before the first step."""

    def start(self, target: Target, context: Context) -> None:  # noqa: B027 - optional
        """Called once, when the prompts have been read. Raise ValueError with the cure if this pair cannot work."""

    @abstractmethod
    def propose(self, context: Context, coins: Coins) -> DraftTree:
        """Draft trees for the batch, no deeper than `context.max_depth`. Draw by `coins.picks` only."""

    def commit(self, acceptance: Acceptance) -> None:  # noqa: B027 - optional
        """Called after every step with what was kept of the last proposal: nothing (`keep` is 0) of rows that had ended,
        and of rows for which another drafter drafted (`Fallback`), when `propose` may not even have been called.
        """

    def patched(self) -> AbstractContextManager[None]:
        """Entered around every step: for drafters that need a model in another state than its owner left it."""
        return nullcontext()
