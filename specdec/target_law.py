"""The target's law after the nodes of a batch of trees.

The law after a node is a function of its logits and, with processors, of the whole text up to it. It is computed when a rule
asks for it: most nodes of a tree are never visited.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.processors import Processors
from specdec.tree import DraftTree

if TYPE_CHECKING:
    from specdec.batch import Batch


class Raw(NamedTuple):
    """What a kernel needs to compute laws itself."""

    logits: Tensor  # [batch, node, vocab]
    filters: tuple[float, int | None, float | None, float | None]  # temperature, top-k, top-p, min-p
    no_law: Tensor  # [batch] int64: how many visited nodes had no law; the caller of the kernel adds to it


class TargetLaw(ABC):
    """The target's law after the nodes of a batch of trees, as rules ask for it."""

    vocab: int

    @abstractmethod
    def at(self, nodes: Tensor, rows: Tensor | None = None) -> Tensor:
        """[n, vocab]: the laws at `nodes` [n] int64 of these `rows` [n] int64; by default at one node of each row."""

    @abstractmethod
    def probabilities(self, row: int, node: int) -> np.ndarray:
        """[vocab] float64: the law at one node of one row."""

    def raw(self) -> Raw | None:
        """The logits and settings that the laws follow from; None if they follow from more than that."""
        return None

    def row(self, row: int, normalise: Callable[[np.ndarray], np.ndarray]) -> RowLaw:
        """The scalar face of one row; `normalise` turns weights [vocab] into a law, in the arithmetic of the coins."""
        return RowLaw(self, row, normalise)


class RowLaw:
    """One row of the target's law, for specifications."""

    def __init__(self, law: TargetLaw, row: int, normalise: Callable[[np.ndarray], np.ndarray]):
        self._law, self._row, self._normalise, self.vocab = law, row, normalise, law.vocab

    def probs(self, node: int) -> np.ndarray:
        """[vocab]: the target's law after the path to `node`."""
        return self._normalise(self._law.probabilities(self._row, node))


class LogitsLaw(TargetLaw):
    """The law that logits give under the sampling and the processors of a run, computed where it is asked for.

    Args:
        logits: [batch, node, vocab] the target's raw logits.
        tree: the trees they belong to.
        batch: text so far, sampling and processors.
        top_down: whether only nodes of the accepted path will be asked for. Processors then follow it without copies.
    """

    def __init__(self, logits: Tensor, tree: DraftTree, batch: Batch, top_down: bool = False):
        self._logits, self._tree, self._batch, self._top_down = logits, tree, batch, top_down
        self._rows, self.vocab = torch.arange(len(logits), device=logits.device), logits.shape[-1]
        self._no_law = torch.zeros_like(self._rows)  # [batch] int64: visited nodes without a law
        # By (row, node): the processed logits [vocab], and the processors after they were called there.
        self._known: dict[tuple[int, int], Tensor] = {}
        self._after: dict[tuple[int, int], Processors] = {}

    def at(self, nodes: Tensor, rows: Tensor | None = None) -> Tensor:
        rows = self._rows if rows is None else rows
        scores = self._logits[rows, nodes]
        if len(nodes) and self._batch.processed:
            visited = zip(rows.tolist(), nodes.tolist(), strict=True)
            scores = torch.stack([self._processed(b, node) for b, node in visited])
        self._check(scores, rows)
        return self._batch.sampling.probabilities(scores)

    def raw(self) -> Raw | None:
        return None if self._batch.processed else Raw(self._logits, self._batch.sampling.filters, self._no_law)

    def probabilities(self, row: int, node: int) -> np.ndarray:
        scores = self._processed(row, node) if self._batch.processors[row] else self._logits[row, node]
        self._check(scores[None], self._rows[row : row + 1])
        return self._batch.sampling.probabilities(scores).double().numpy(force=True)

    def scores(self, path: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """The scores after the processors, and the logits: [batch, place, vocab] each, at the nodes of accepted paths.

        Args:
            path: [batch, place] int64: the nodes, the root first.
            accepted: [batch] int64: the place of the last node. At later places the scores are the logits.

        Returns:
            Scores, at least float32; and logits.
        """
        logits = self._logits[self._rows[:, None], path]
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self._batch.processed:
            paths = [nodes[: last + 1] for nodes, last in zip(path.tolist(), accepted.tolist(), strict=True)]
            known = [torch.stack([self._processed(row, node) for node in nodes]) for row, nodes in enumerate(paths)]
            rest = zip(known, scores, strict=True)
            scores = torch.stack([torch.cat([part, row[len(part) :]]) for part, row in rest])
        return scores, logits

    def processors(self, last: Tensor) -> list[Processors]:
        """Each row's processors after the text up to its node `last` [batch] int64. The next step begins with them."""
        for row, node in enumerate(last.tolist()):
            self._processed(row, node)  # the rule may not have asked for it
        return [self._processors(row, node) for row, node in enumerate(last.tolist())]

    def invalid(self) -> Tensor:
        """[batch] bool: rows in which a visited node has no law: its logits are NaN, or all -inf."""
        return self._no_law > 0

    def _check(self, scores: Tensor, rows: Tensor) -> None:
        """Count the scores that give no law, by row: the largest is NaN or infinite."""
        self._no_law.index_add_(0, rows, (~scores.amax(-1).isfinite()).long())

    def _processed(self, row: int, node: int) -> Tensor:
        """[vocab]: the logits at one node after the row's processors, which are called once per node."""
        if (row, node) not in self._known:
            logits, text = self._logits[row, node], self._text(row, node)
            scores = (logits if logits.dtype == torch.float64 else logits.float())[None]
            if text is not None:
                before = self._processors(row, int(self._tree.topology.parents[row, node]))
                scores, self._after[row, node] = before(text, scores, last=self._top_down)
            self._known[row, node] = scores[0]
        return self._known[row, node]

    def _processors(self, row: int, node: int) -> Processors:
        """The row's processors after their last call on the path to a node; -1 is above the root."""
        while node >= 0 and (row, node) not in self._after:
            node = int(self._tree.topology.parents[row, node])
        return self._after.get((row, node), self._batch.processors[row])

    def _text(self, row: int, node: int) -> Tensor | None:
        """The text up to a node; None if it can never be emitted, as processors may refuse such a text."""
        if not self._batch.host_left[row]:  # it has ended
            return None
        path = self._tree.topology.ancestors[row, node].nonzero()[:, 0].tolist()
        drafted = self._tree.tokens[row, path[1:]]
        for above, token in zip(path, drafted.tolist(), strict=False):
            if token in self._batch.stop_tokens or self._processed(row, above)[token] == -torch.inf:
                return None
        return torch.cat([self._batch.tokens[row, : self._batch.host_lengths[row]], drafted])
