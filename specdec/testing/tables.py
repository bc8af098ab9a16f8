"""Targets and drafters that are tables: a random law for every text, small enough to enumerate."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.coins import Coins
from specdec.drafters import Context, Drafter
from specdec.drafters.drafter import Acceptance
from specdec.sampling import Sampling
from specdec.target import Target
from specdec.tree import DraftTree, TreeSpec
from specdec.trees import Frontier, TreePolicy
from specdec.trees.policy import drive

Text = tuple[int, ...]


class Table:
    """A random law for every text: context-dependent logits [vocab] float64, a function of (seed, text)."""

    def __init__(self, vocab: int, seed: int = 0):
        self.vocab, self.seed = vocab, seed
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


class TabularDrafter(Drafter):
    """A drafter that is a table, growing any tree."""

    def __init__(self, table: Table, tree: TreePolicy):
        self.table, self.tree = table, tree

    def spec(self, sampling: Sampling) -> TreeSpec:
        return self.tree.spec(sampling)

    def propose(self, context: Context, coins: Coins) -> DraftTree:
        asked: list[Tensor] = []

        def score(frontier: Frontier) -> Tensor:
            asked.append(frontier.tokens)
            texts = _paths(context.texts, torch.cat(asked, 1), frontier.topology.ancestors)
            count = frontier.tokens.shape[1]
            return torch.stack([torch.stack([self.table.logits(text) for text in row[-count:]]) for row in texts])

        return drive(self.tree, context, coins, score).tree

    def commit(self, acceptance: Acceptance) -> None:
        self.tree.commit(acceptance)


def _paths(prefixes: list[list[int]], tokens: Tensor, ancestors: Tensor) -> list[list[Text]]:
    """The text up to each node of each row; prefixes end in the root."""
    rows = []
    for prefix, row, reach in zip(prefixes, tokens.tolist(), ancestors.tolist(), strict=True):
        rows.append(
            [(*prefix, *(t for t, on_path in zip(row[1:], line[1:], strict=True) if on_path)) for line in reach]
        )
    return rows
