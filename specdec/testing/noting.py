"""What drafters draft, noted as they do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.batch import Batch
from specdec.coins import Coins
from specdec.drafters import Drafter, DraftRun
from specdec.laws import Law
from specdec.models.target import TargetRun
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec


@dataclass(frozen=True)
class Draft:
    """What was drafted for one row, node by node."""

    text: tuple[int, ...]  # the text before the draft
    tokens: list[int]
    parents: list[int]
    laws: list[int]
    probs: Tensor | None  # [internal, vocab]: what the children of the first nodes were drawn by

    @property
    def kept(self) -> list[int]:
        """The tokens of the nodes that exist."""
        return [token for token, law in zip(self.tokens, self.laws, strict=True) if law != Law.PADDING]

    @property
    def depths(self) -> list[int]:
        """The depth of each node; -1 for nodes that do not exist."""
        depths: list[int] = []
        for parent, law in zip(self.parents, self.laws, strict=True):
            above = depths[parent] if depths else -1
            depths.append(-1 if law == Law.PADDING else above + 1)
        return depths

    def path(self, node: int) -> list[int]:
        """The tokens of the nodes from below the root to this one."""
        return [] if node == 0 else [*self.path(self.parents[node]), self.tokens[node]]


class Noting(Drafter):
    """Wraps a drafter and notes in `drafts` what its runs draft for every row."""

    def __init__(self, drafter: Drafter):
        self.drafter, self.states, self.models = drafter, drafter.states, drafter.models
        self.drafts: list[Draft] = []

    def spec(self, sampling: Sampling) -> TreeSpec:
        return self.drafter.spec(sampling)

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        run = self.drafter.start(target, batch)
        propose = run.propose

        def noted(coins: Coins) -> DraftTree:
            tree = propose(coins)
            tokens, parents, laws = (t.tolist() for t in (tree.tokens, tree.topology.parents, tree.laws))
            for b, text in enumerate(batch.texts):
                probs = None if tree.draft_probs is None else tree.draft_probs[b].clone()
                self.drafts.append(Draft(tuple(text.tolist()), tokens[b], parents[b], laws[b], probs))
            return tree

        run.propose = noted
        return run
