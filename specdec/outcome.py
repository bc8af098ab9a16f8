"""What a step gave each row of a batch, after stop tokens and budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.laws import Law
from specdec.tree import DraftTree

if TYPE_CHECKING:
    from specdec.rules.base import Decisions


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a step gave each row. Its tensors are on the device; the first list that is read waits for it.

    Args:
        path: [batch, <= depth + 1] int64: accepted nodes, the root first; entries from `keep` on are unused.
        keep: [batch] int64: how many nodes of `path` the text contains, the root included. As many tokens are new: the
            drafted ones below the root, and one that the target emits. 0 for rows that had ended, or whose prompts are being
            read.
        columns: [batch, depth + 6] int64: the new tokens, then one column for each count. Read it by the properties.
        noted: [batch, <= depth + 1, note, ...] float32: what the run notes of each new token; None if it notes nothing.
    """

    path: Tensor
    keep: Tensor
    columns: Tensor
    noted: Tensor | None = None

    @classmethod
    def of(
        cls, tree: DraftTree, decisions: Decisions, stop_tokens: Tensor, left: Tensor, invalid: Sequence[Tensor]
    ) -> Outcome:
        """Cut a rule's decisions at the first stop token and at the budgets.

        Args:
            tree: the trees that were decided on.
            decisions: what the rule decided.
            stop_tokens: [n] int64: tokens that end a text.
            left: [batch] int64: tokens that each row may still emit.
            invalid: [batch] bool each: rows in which the target gave no law, and rows whose draft cannot be right.
        """
        path, accepted = decisions.path, decisions.accepted[:, None]
        place = torch.arange(path.shape[1], device=path.device)
        tokens = tree.tokens.gather(1, path).roll(-1, 1).scatter(1, accepted, decisions.token[:, None])
        # `torch.isin` would sort long lists of stop tokens, and on a GPU wait for the result.
        ends = (tokens[..., None] == stop_tokens).any(-1) & (place <= accepted)
        first_end = torch.where(ends, place, path.shape[1]).amin(1)
        count = torch.minimum(torch.minimum(decisions.accepted, first_end) + 1, left)
        has_children = ((tree.topology.parents == decisions.last[:, None]) & (tree.laws != Law.PADDING)).any(1)
        tried = torch.minimum(decisions.accepted + has_children, count)
        after = torch.where(first_end < count, 0, left - count)
        counts = (torch.minimum(decisions.accepted, count), tried, after, *invalid)
        return cls(path, count, torch.cat([tokens, *(part[:, None] for part in (count, *counts))], 1))

    @classmethod
    def given(cls, tokens: Sequence[int], left: int) -> Outcome:
        """What another engine has given a batch of one row, none of it taken from the last proposal's tree."""
        columns = torch.tensor([[*tokens, len(tokens), 0, 0, left, 0, 0]])
        return cls(torch.zeros(1, len(tokens), dtype=torch.int64), torch.tensor([len(tokens)]), columns)

    @property
    def tokens(self) -> Tensor:
        """[batch, <= depth + 1] int64: the new tokens; entries from `keep` on are unused."""
        return self.columns[:, : -len(_COUNTS)]

    @property
    def left_after(self) -> Tensor:
        """[batch] int64: tokens that each row may still emit; 0 as in `left`."""
        return self.columns[:, _COUNTS.index("left") - len(_COUNTS)]

    @cached_property
    def _host(self) -> list[list[int]]:
        return self.columns.T.tolist()

    def _count(self, name: str) -> list[int]:
        return self._host[_COUNTS.index(name) - len(_COUNTS)]

    @property
    def emitted(self) -> list[list[int]]:
        """Each row's new tokens."""
        rows = zip(*self._host[: -len(_COUNTS)], strict=True)
        return [list(row[:n]) for row, n in zip(rows, self._count("emitted"), strict=True)]

    @property
    def notes(self) -> list[Tensor]:
        """[new tokens, note, ...] float32 of each row, on the host; empty if the run notes nothing."""
        if self.noted is None:
            return []
        counts = self._count("emitted")
        return [*torch.cat([row[:n] for row, n in zip(self.noted, counts, strict=True)]).cpu().split(counts)]

    @property
    def accepted(self) -> list[int]:
        """How many of each row's new tokens were drafted."""
        return self._count("accepted")

    @property
    def tried(self) -> list[int]:
        """The deepest depth of each row at which drafted tokens were tested: `accepted`, or one more."""
        return self._count("tried")

    @property
    def left(self) -> list[int]:
        """Tokens that each row may still emit: 0 when it has ended, or while its prompt is being read."""
        return self._count("left")

    @property
    def invalid(self) -> list[list[int]]:
        """Running rows in which the target gave no law, and running rows whose draft cannot be right."""
        running = self._count("emitted")
        columns = (self._count("no law"), self._count("no draft"))
        return [[b for b, n in enumerate(running) if n and bad[b]] for bad in columns]

    def of_rows(self, rows: Tensor) -> Outcome:
        """The outcome of these rows [batch] bool; `keep` is 0 in all others. Lists on the host stay those of all rows."""
        return replace(self, path=self.path.where(rows[:, None], 0), keep=self.keep.where(rows, 0))


# The last columns of `Outcome.columns`, behind the tokens.
_COUNTS = ("emitted", "accepted", "tried", "left", "no law", "no draft")
