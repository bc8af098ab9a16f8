"""Typical acceptance (Medusa, arXiv:2401.10774): tokens that the target finds likely enough are kept, without any coin.

Not lossless: it does not look at how the draft was drawn. At temperature 0 only the target's own token is likely enough, and
the text is the target's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from specdec.checks import as_float, put
from specdec.coins import Coins, RowCoins
from specdec.rules.base import Decision, Decisions, Rule
from specdec.rules.children import Siblings
from specdec.target_law import RowLaw, TargetLaw
from specdec.tree import DraftTree, RowTree


@dataclass(frozen=True)
class TypicalAcceptance(Rule):
    """Accept x where p(x) > min(epsilon, alpha exp(-entropy(p))), keep the longest accepted path, sample what follows.

    Args:
        epsilon: a probability above this is always likely enough.
        alpha: so is one above alpha exp(-entropy), which is lower where the target is undecided.
    """

    epsilon: float = 0.09
    alpha: float = 0.3

    def __post_init__(self) -> None:
        put(self, **{name: as_float(name, getattr(self, name), "[0, 1]") for name in ("epsilon", "alpha")})

    def decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        paths = [[0]]
        for path in paths:  # the list grows while it is walked
            children = tree.children(path[-1])
            if children:
                likely = self._likely(target_law.probs(path[-1]).astype(np.float64))
                paths += [[*path, child] for child in children if likely[tree.tokens[child]]]
        longest = max(paths, key=lambda path: (len(path), -path[-1]))  # on a tie, the one whose last node comes first
        return Decision(longest, coins.pick(longest[-1], target_law.probs(longest[-1])))

    def _likely(self, p: np.ndarray) -> np.ndarray:
        """[vocab] bool: the tokens that are likely enough."""
        entropy = -sum(p[p > 0] * np.log(p[p > 0]))
        return p > min(self.epsilon, self.alpha * math.exp(-entropy))

    def trial(self, owed: np.ndarray, law: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._likely(owed).astype(np.float64), owed

    def decide_batch(self, tree: DraftTree, target_law: TargetLaw, coins: Coins) -> Decisions:
        kept = torch.zeros_like(tree.tokens)  # [batch, node] int64: 1 for accepted nodes
        kept[:, 0] = 1
        for index in range(tree.tokens.shape[1] - 1):
            node = torch.full_like(tree.tokens[:, 0], index)
            siblings = Siblings(tree, node)
            trying = siblings.exists & (kept[:, index : index + 1] > 0)
            p = target_law.at(torch.where(trying.any(1), node, 0))
            threshold = (self.alpha * (-torch.special.entr(p).sum(1, keepdim=True)).exp()).clamp(max=self.epsilon)
            likely = trying & (p.gather(1, siblings.tokens) > threshold)
            kept = kept.scatter_reduce(1, siblings.index, likely.long(), "amax")
        node = (kept * (tree.topology.depths + 1)).argmax(1, keepdim=True)  # the first of the deepest accepted nodes
        return Decisions.ending_at(node, target_law.at(node[:, 0]), tree.topology, coins)
