"""The contract of an acceptance rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from specdec.coins import Coins, Purpose, RowCoins, inverse_cdf
from specdec.target_law import RowLaw, TargetLaw
from specdec.tree import DraftTree, RowTree, Topology, TreeSpec


@dataclass(frozen=True)
class Decision:
    """What a rule decided for one row.

    Args:
        path: accepted nodes from the root (index 0, always there) downwards.
        token: the recovered or bonus token, emitted after the last accepted node.
    """

    path: list[int]
    token: int


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a rule decided for a batch.

    Args:
        path: [batch, <= depth + 1] int64: accepted nodes from the root down; entries past `accepted` are unused.
        accepted: [batch] int64: number of accepted drafted tokens (the root does not count).
        token: [batch] int64: the recovered or bonus token.
    """

    path: Tensor
    accepted: Tensor
    token: Tensor

    @property
    def last(self) -> Tensor:
        """[batch] int64: the last accepted nodes."""
        return self.path.gather(1, self.accepted[:, None])[:, 0]

    @classmethod
    def ending_at(cls, node: Tensor, law: Tensor, topology: Topology, coins: Coins) -> Decisions:
        """Accept the path to `node` [batch, 1] int64, and draw the token after it from `law` [batch, vocab]."""
        rows = torch.arange(len(node), device=node.device)
        depths, place = topology.depths, torch.arange(topology.depth + 1, device=node.device)[:, None]
        on_path = topology.ancestors[rows, node[:, 0]][:, None] & (depths[:, None] == place)  # [batch, depth + 1, node]
        token = inverse_cdf(law, coins.uniforms(Purpose.EMIT).gather(1, node)[:, 0])
        return cls(on_path.long().argmax(-1), depths.gather(1, node)[:, 0], token)


class Rule(ABC):
    """Decides which drafted tokens are kept and what is emitted after them.

    Write `decide` and the rule works with batches, trees, traces and the certificate
    (`specdec.testing.assert_lossless(MyRule())`). A rule that is to be fast also overrides `decide_batch` with tensor
    code that makes the same decisions on the same coins.

    Class attributes:
        lossless: whether the emitted text has exactly the target's law, for every tree that `check` admits.
        capturable: whether `decide_batch` reads nothing back from the device: see `specdec.engines.graphs`.
        top_down: whether the rule asks for the target's law at accepted nodes only, parents first. Logits processors that
            keep state then follow the path; for other rules they are copied at every node.
    """

    capturable: ClassVar[bool] = False
    top_down: ClassVar[bool] = False
    lossless: ClassVar[bool] = False  # True if the text has exactly the target's law for every tree that `check` admits

    def check(self, spec: TreeSpec) -> None:  # noqa: B027 - optional: most rules accept every tree
        """Raise ValueError, naming the cure, if the rule does not keep its promises for such trees."""

    @abstractmethod
    def decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        """The specification, for one row.

        Args:
            tree: `tokens`, `children(node)` and `draws(node, vocab)`: children with the law each was drawn from.
            target_law: `probs(node)` [vocab]: the target's law after the path to `node`; computed when asked for.
            coins: `accept(node, probability)` and `pick(node, probabilities)`; each node's coins are its own.
        """

    def decide_batch(self, tree: DraftTree, target_law: TargetLaw, coins: Coins) -> Decisions:
        """The decisions for every row; by default `decide`, row by row."""
        rows = []
        for b in range(len(tree.tokens)):
            flips = coins.row(b)
            rows.append(self._decide(tree.row(b, flips.normalise), target_law.row(b, flips.normalise), flips))
        device, width = tree.tokens.device, tree.topology.depth + 1
        path = torch.tensor([r.path + [0] * (width - len(r.path)) for r in rows], device=device)
        accepted = torch.tensor([len(r.path) - 1 for r in rows], device=device)
        return Decisions(path, accepted, torch.tensor([r.token for r in rows], device=device))

    def _decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        """Call `decide` and check its answer: a mistake in a user's rule must not become text."""
        decision = self.decide(tree, target_law, coins)
        if not isinstance(decision, Decision):
            raise ValueError(f"{type(self).__name__}.decide returned {decision!r}; return a Decision(path, token).")
        path, token = decision.path, decision.token
        if path[:1] != [0] or any(child not in tree.children(node) for node, child in pairwise(path)):
            raise ValueError(
                f"{type(self).__name__}.decide accepted {path}: a path starts at the root, 0, and goes from child to child."
            )
        if not 0 <= token < target_law.vocab:
            raise ValueError(
                f"{type(self).__name__}.decide emitted token {token}: the vocabulary has ids 0 to {target_law.vocab - 1}."
            )
        return decision

    def trial(self, owed: np.ndarray, law: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What trying one child does. Only rules that are not lossless need it: their divergence is computed by it.

        Args:
            owed: [vocab] the law that the rule would emit from if there were no more children; at first the target's.
            law: [vocab] the law that the child was drawn from.

        Returns:
            The chance [vocab] to accept the child, by its token, and `owed` after it was rejected.
        """
        raise NotImplementedError

    def __call__(self, tree: DraftTree, target_law: TargetLaw, coins: Coins) -> Decisions:
        """Decide by `decide_batch`, or by the specification when the coins follow every outcome."""
        return (Rule.decide_batch if coins.enumerates else type(self).decide_batch)(self, tree, target_law, coins)
