"""Drafting nothing: autoregressive decoding as the same loop with trees of one node."""

from specdec.batch import Batch
from specdec.coins import Coins
from specdec.drafters.base import Drafter, DraftRun
from specdec.laws import Law
from specdec.models.target import TargetRun
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec


class NoDrafter(Drafter):
    """Drafts nothing: the baseline, `drafter=None`."""

    capturable = True

    def spec(self, sampling: Sampling) -> TreeSpec:
        return TreeSpec(frozenset({Law.POINT}), nodes=1, depth=0, width=0, by_depth=True)

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        return last if last and last.batch is batch else _Undrafted(self, batch)


class _Undrafted(DraftRun):
    def enter(self, rows: list[int]) -> None:
        """Nothing is to be done, as nothing is kept of a text."""

    def propose(self, coins: Coins) -> DraftTree:
        return self.batch.undrafted()
