"""What drafts may still lose, counted in steps without a draft. Numbers on the host only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median_low

import numpy as np

# Times patience: how much of what drafts have gained they may lose again. More finds out later that a text has changed.
_SAVED = 4.0
# Times that are kept of every size of tree: their median does not mind that other processes interrupt a step.
_RECENT = 5
# Before the first draft: so many more tokens, of all rows, are taken to add half of a step.
_GUESSED = 8


class Balance:
    """Decides by the steps so far what the next may risk.

    Args:
        patience, share, seconds: as in `Paused`.
        rows: how many rows the batch has.
    """

    def __init__(self, patience: float, share: float, seconds: Callable[[int], float] | None = None, rows: int = 1):
        self.left, self._most, self._share, self._given = patience, _SAVED * patience, share, seconds
        self._times: dict[int, deque[float]] = {}  # the newest seconds of steps, by nodes; 0 without a draft
        self._losses: dict[int, float] = {}  # by how many steps without a draft one with a draft takes longer, by nodes
        self._guess = {1 + max(_GUESSED // rows, 1): 0.5}
        self._charged: dict[int, float] = {}  # what the first step with so many nodes was charged
        self._since = 0  # steps since the last one without a draft

    @property
    def drafts(self) -> bool:
        """Whether the next step may have a draft."""
        timed = self._given is not None or (0 in self._times and self._since < 1 / self._share)
        return timed and self.left > 0

    def loss(self, nodes: int) -> float:
        """By how many steps without a draft a step with trees of so many nodes takes longer, as far as is known.

        More nodes take longer, but no more than in proportion: so each size that is known bounds all others.
        """
        if self._given is not None:
            return self._given(nodes) / self._given(1) - 1
        known = self._losses or self._guess
        return min(loss * max(1.0, (nodes - 1) / (size - 1)) for size, loss in known.items())

    def affords(self, gains: np.ndarray) -> int:
        """How many drafted nodes are expected to gain most, of those whose loss is left; 0 if none gains.

        Args:
            gains: [drafted node] float64: the tokens that are expected of 1, 2, ... drafted nodes.
        """
        losses = np.array([self.loss(nodes) for nodes in range(2, 2 + len(gains))])
        worth = np.where(losses <= self.left, gains - losses, 0.0)
        return int(worth.argmax()) + 1 if (worth > 0).any() else 0

    def see(self, nodes: int, tokens: float, seconds: float) -> None:
        """A step with trees of so many nodes, 0 without a draft: what it gave, and how long it took."""
        self._times.setdefault(nodes, deque(maxlen=_RECENT)).append(seconds)
        self._since = self._since + 1 if nodes else 0
        gained = tokens - 1 - self._charge(nodes) if nodes else self._share
        self.left = min(self.left + gained, self._most)

    def _charge(self, nodes: int) -> float:
        """What a step with such trees has cost; from then on it is known."""
        times, foreseen = self._times[nodes], self.loss(nodes)
        if self._given is not None:
            return foreseen
        longer = median_low(times) / median_low(self._times[0]) - 1
        if len(times) == 1:
            # The first may have compiled or captured something, as happens once: what it took beyond is charged if the second
            # takes it too.
            self._charged[nodes] = longer = min(longer, foreseen)
        if nodes > 1:  # a drafter may have had nothing to draft: that is charged, and says nothing of other sizes
            self._losses[nodes] = max(longer, 0.0)
        return 2 * longer - self._charged[nodes] if len(times) == 2 else longer
