"""Targets and drafters that are tables: a random law for every text, small enough to enumerate."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.checks import as_int, check_kind
from specdec.drafters import Context, TreeDrafter
from specdec.drafters.base import Acceptance
from specdec.models.target import Target
from specdec.tree import DraftTree
from specdec.trees import Frontier, TreePolicy

Text = tuple[int, ...]


class Table:
    """A random law for every text: context-dependent logits [vocab] float64, a function of (seed, text)."""

    def __init__(self, vocab: int, seed: int = 0):
        self.vocab, self.seed = as_int("vocab", vocab, 1), as_int("seed", seed, 0)
        self._known: dict[Text, Tensor] = {}

    def logits(self, text: Text) -> Tensor:
        """[vocab] float64 logits after `text`."""
        if text not in self._known:
            self._known[text] = torch.from_numpy(np.random.default_rng([self.seed, *text]).normal(0, 1.5, self.vocab))
        return self._known[text]


class TabularTarget(Table, Target):
    """A target that is a table."""

    context_length = None
    device = torch.device("cpu")

    def start(self, context: Context, capacity: int, hidden: bool) -> None: ...

    def score(self, tree: DraftTree, context: Context) -> Tensor:
        texts = _paths(context.texts, tree.tokens, tree.topology.ancestors)
        return torch.stack([torch.stack([self.logits(text) for text in row]) for row in texts])

    def commit(self, acceptance: Acceptance) -> None: ...


class TabularDrafter(TreeDrafter):
    """A drafter that is a table, growing any tree."""

    def __init__(self, table: Table, tree: TreePolicy):
        super().__init__(tree)
        check_kind("table", table, Table)
        self.table = table

    def score(self, frontier: Frontier, context: Context) -> Tensor:
        count = frontier.tokens.shape[1]
        before = self._tokens if frontier.topology.depth else frontier.tokens[:, :0]
        self._tokens = torch.cat([before, frontier.tokens], 1)  # [batch, asked]: of all nodes asked for in this tree
        texts = _paths(context.texts, self._tokens, frontier.topology.ancestors)
        return torch.stack([torch.stack([self.table.logits(text) for text in row[-count:]]) for row in texts])


def _paths(prefixes: list[list[int]], tokens: Tensor, ancestors: Tensor) -> list[list[Text]]:
    """The text up to each node of each row; prefixes end in the root."""
    rows = []
    for prefix, row, reach in zip(prefixes, tokens.tolist(), ancestors.tolist(), strict=True):
        rows.append(
            [(*prefix, *(t for t, on_path in zip(row[1:], line[1:], strict=True) if on_path)) for line in reach]
        )
    return rows
