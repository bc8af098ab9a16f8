"""A tree policy: it asks for logits after nodes it has drawn, and draws more, until it returns the tree."""

from dataclasses import dataclass

import torch

from specdec import DraftTree, Law, TreeSpec
from specdec.testing import Table, TabularDrafter, TabularTarget, assert_drafter
from specdec.tree import Topology
from specdec.trees import Frontier, Grown, TreePolicy, TreeRun, draw


@dataclass(frozen=True)
class Star(TreePolicy):
    """Independent children of the root, and nothing below them."""

    width: int

    def spec(self, sampling):
        law = Law.IID if sampling.temperature else Law.POINT
        return TreeSpec(frozenset({law}), nodes=1 + self.width, depth=1, width=self.width, by_depth=True)

    def start(self, batch, last=None):
        return StarRun(self, batch)


class StarRun(TreeRun):
    def grow(self, coins):
        batch, width = self.batch, self.policy.width
        logits = yield Frontier(batch.root[:, None], batch.chain(1))
        drawn = draw(logits, width, Law.IID, batch.sampling, coins, first=1)
        tokens = torch.cat([batch.root[:, None], drawn.tokens], 1)
        parents = torch.tensor([-1] + [0] * width, device=batch.device).expand(len(batch), -1)
        laws = torch.cat([drawn.laws, torch.zeros_like(drawn.tokens, dtype=torch.uint8)], 1)
        asked = torch.where(parents < 0, 0, -1)  # the root first, its children never
        return Grown(DraftTree(tokens, Topology(parents, 1, width), laws, drawn.draft_probs), asked)


assert_drafter(TabularDrafter(Table(3, seed=1), Star(2)), TabularTarget(3), [(0, 1, 0), (2,)])
