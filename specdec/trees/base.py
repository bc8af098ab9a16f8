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
    """Nodes whose continuations a policy asks for.

    Args:
        tokens: [batch, count] int64.
        topology: of all nodes asked for so far, these last; node 0 is the root.
    """

    tokens: Tensor
    topology: Topology


@dataclass(frozen=True, eq=False)
class Grown:
    """A finished tree.

    Args:
        tree: the draft trees.
        asked: [batch, node] int64: the order in which each node was asked for, -1 for nodes that never were.
    """

    tree: DraftTree
    asked: Tensor


Growth = Generator[Frontier, Tensor, Grown]


class TreePolicy(ABC):
    """Decides the shape of draft trees; drafters that can score any node grow them with it. It may serve any number of runs."""

    capturable: bool = False  # True if `grow` does the same to the device every step: see `specdec.engines.graphs`

    @abstractmethod
    def spec(self, sampling: Sampling) -> TreeSpec:
        """What trees this policy may grow under this sampling."""

    @abstractmethod
    def start(self, batch: Batch, last: TreeRun | None = None) -> TreeRun:
        """Begin a run for these texts.

        Args:
            batch: the texts; it stays the same object for the whole run.
            last: the run of an earlier batch. A policy that can begin anew in the tensors of that one returns it, so that what
                was captured with them is replayed.
        """


class TreeRun(ABC):
    """A policy at work on the texts of one run."""

    def __init__(self, policy: TreePolicy, batch: Batch):
        self.policy, self.batch = policy, batch

    def serves(self, policy: TreePolicy, batch: Batch) -> bool:
        """Whether it is a run of this policy, over the tensors of this batch."""
        return self.policy == policy and self.batch is batch

    @abstractmethod
    def grow(self, coins: Coins) -> Growth:
        """A generator: yield a `Frontier`, receive the draft's logits [batch, count, vocab] after its nodes, repeat.

        What to draw next may depend on anything drawn before. A sampled node is never dropped or re-ranked, and a
        POINT node only on what was known before anything below it was sampled. Not deeper than `Batch.max_depth`. A tree
        of the root alone may be returned without asking for anything.
        """

    def commit(self, outcome: Outcome) -> None:  # noqa: B027 - optional
        """Called after every step, for policies that learn: what became of the last tree, if one was grown since."""


def grow_tree(run: TreeRun, coins: Coins, most: int, score: Callable[[Frontier], Tensor]) -> Grown:
    """Grow a tree, answering the policy's frontiers with `score`; at most so many nodes may be asked for."""
    growth = run.grow(coins)
    try:
        frontier = next(growth)
        while True:
            check_kind(f"what {type(run).__name__}.grow yielded", frontier, Frontier)
            asked = frontier.topology.parents.shape[1]
            if asked > most:  # caches have no room for them but that of the next row
                raise ValueError(
                    f"{type(run).__name__} asks to continue {asked} nodes, of {most} at most by its TreeSpec: raise `nodes`."
                )
            frontier = growth.send(score(frontier))
    except StopIteration as stop:
        check_kind(f"what {type(run).__name__}.grow returned", stop.value, Grown)
        return stop.value
