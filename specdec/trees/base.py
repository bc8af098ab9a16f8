"""The contract of a tree policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass

from torch import Tensor

from specdec.batch import Batch
from specdec.checks import check_kind
from specdec.coins import Coins
from specdec.outcome import Outcome
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Topology, TreeSpec


@dataclass(frozen=True, eq=False)
class Frontier:
    """Nodes after which a policy asks for the draft's logits.

    Args:
        tokens: [batch, count] int64: the tokens of these nodes.
        topology: the shape of all nodes asked for so far, these last; node 0 is the root.
    """

    tokens: Tensor
    topology: Topology


@dataclass(frozen=True, eq=False)
class Grown:
    """A finished tree.

    Args:
        tree: the draft trees.
        asked: [batch, node] int64: the place of each node among those asked for, in order; -1 for all others.
    """

    tree: DraftTree
    asked: Tensor


Growth = Generator[Frontier, Tensor, Grown]


class TreePolicy(ABC):
    """Decides the shape of draft trees. It may serve any number of runs, and any drafter that can score nodes.

    Class attributes:
        capturable: whether `grow` does the same to the device every step: see `specdec.engines.graphs`.
    """

    capturable: bool = False

    @abstractmethod
    def spec(self, sampling: Sampling) -> TreeSpec:
        """What trees this policy may grow under this sampling."""

    @abstractmethod
    def start(self, batch: Batch, last: TreeRun | None = None) -> TreeRun:
        """Begin a run for these texts.

        Args:
            batch: the texts; it stays the same object for the whole run.
            last: an earlier run. A policy that can use its tensors again returns it, begun anew, so that what was captured
                with them is replayed.
        """


class TreeRun(ABC):
    """A policy at work on the texts of one run."""

    def __init__(self, policy: TreePolicy, batch: Batch):
        self.policy, self.batch = policy, batch

    def serves(self, policy: TreePolicy, batch: Batch) -> bool:
        """Whether this is a run of that policy, in the tensors of that batch."""
        return self.policy == policy and self.batch is batch

    @abstractmethod
    def grow(self, coins: Coins) -> Growth:
        """A generator: yield a `Frontier`, receive the draft's logits [batch, count, vocab] after its nodes, repeat.

        It returns a `Grown`, no deeper than `Batch.max_depth`. What to draw next may depend on anything drawn before. A sampled
        node must never be dropped or re-ranked; a POINT node may be, by what was known before anything below it was sampled.
        A tree of the root alone needs no frontier.
        """

    def commit(self, outcome: Outcome) -> None:  # noqa: B027 - optional
        """Learn from what became of the last tree. Called after every step, even if no tree was grown in it."""


def grow_tree(run: TreeRun, coins: Coins, most: int, score: Callable[[Frontier], Tensor]) -> Grown:
    """Grow a tree, answering the policy's frontiers with `score`; at most `most` nodes may be asked for."""
    growth = run.grow(coins)
    try:
        frontier = next(growth)
        while True:
            check_kind(f"what {type(run).__name__}.grow yielded", frontier, Frontier)
            asked = frontier.topology.parents.shape[1]
            if asked > most:  # in the cache, they would run into the next row
                raise ValueError(
                    f"{type(run).__name__} asks for the scores of {asked} nodes, but its TreeSpec allows {most}: raise `nodes`."
                )
            frontier = growth.send(score(frontier))
    except StopIteration as stop:
        check_kind(f"what {type(run).__name__}.grow returned", stop.value, Grown)
        return stop.value
