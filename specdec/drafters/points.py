"""Drafters whose nodes are all POINT children, listed with an estimate each, so that a wrapper may draft only some of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from specdec.coins import Coins
from specdec.drafters.base import DraftRun
from specdec.tree import DraftTree, tree_of_points


class Point(NamedTuple):
    """A drafted node.

    Args:
        token: its token.
        parent: the node that it follows; 0 is the root, and the first point of a list is node 1.
        chance: an estimate of the probability that the text goes on through it.
    """

    token: int
    parent: int
    chance: float


class PointRun(DraftRun):
    """A run that lists what it drafts. The lists follow from the texts so far, with no coin."""

    @abstractmethod
    def points(self) -> list[list[Point]]:
        """The nodes of each row after the root, parents first, no deeper than `batch.max_depth` and than the row may use."""

    def propose(self, coins: Coins) -> DraftTree:
        return self.tree(self.points())

    def tree(self, drafts: Sequence[Sequence[Point]]) -> DraftTree:
        """The tree of these points; any first part of each row's list may be left."""
        return tree_of_points(self.batch.root, [[(point.token, point.parent) for point in draft] for draft in drafts])
