"""Targets and drafters that are tables of random laws, small enough to enumerate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import as_int, check_kind
from specdec.drafters.base import DraftRun
from specdec.drafters.tree_drafter import TreeDrafter, TreeDraftRun
from specdec.models.target import Scores, Target, TargetRun
from specdec.tree import DraftTree
from specdec.trees.base import Frontier, TreePolicy

Text = tuple[int, ...]


class Table:
    """A random law for every text: logits [vocab] float64 that are a function of (seed, text)."""

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

    def start(self, batch: Batch, states: Sequence[int] = (), last: TargetRun | None = None) -> TargetRun:
        return _TabularRun(self, batch)


class _TabularRun(TargetRun):
    target: TabularTarget

    def enter(self, rows: list[int], draft: DraftRun) -> None:
        """Nothing is to be done, as every text is looked up as it is now."""

    def score(self, tree: DraftTree) -> Scores:
        texts = _paths(self.batch.texts, tree.tokens, tree.topology.ancestors)
        return Scores(torch.stack([torch.stack([self.target.logits(text) for text in row]) for row in texts]))


class TabularDrafter(TreeDrafter):
    """A drafter that is a table, growing any tree."""

    def __init__(self, table: Table, tree: TreePolicy):
        super().__init__(tree)
        check_kind("table", table, Table)
        self.table = table

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        return TabularDraftRun(self, batch, last)


class TabularDraftRun(TreeDraftRun):
    """A table at work."""

    drafter: TabularDrafter

    def enter(self, rows: list[int]) -> None:
        """Nothing is to be done, as every text is looked up as it is now."""

    def score(self, frontier: Frontier) -> Tensor:
        count = frontier.tokens.shape[1]
        before = self._tokens if frontier.topology.depth else frontier.tokens[:, :0]
        self._tokens = torch.cat([before, frontier.tokens], 1)  # [batch, asked]: all nodes asked for in this tree
        texts = _paths(self.batch.texts, self._tokens, frontier.topology.ancestors)
        logits = self.drafter.table.logits
        return torch.stack([torch.stack([logits(text) for text in row[-count:]]) for row in texts])


def _paths(prefixes: list[np.ndarray], tokens: Tensor, ancestors: Tensor) -> list[list[Text]]:
    """The text up to each node of each row; prefixes end in the root."""
    rows = []
    texts = (prefix.tolist() for prefix in prefixes)
    for prefix, row, reach in zip(texts, tokens.tolist(), ancestors.tolist(), strict=True):
        rows.append(
            [(*prefix, *(t for t, on_path in zip(row[1:], line[1:], strict=True) if on_path)) for line in reach]
        )
    return rows
