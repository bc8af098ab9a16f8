"""Drafting nothing: autoregressive decoding as the same loop with trees of one node."""

from specdec.coins import Coins
from specdec.drafters.base import Context, Drafter
from specdec.laws import Law
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec, root_only


class NoDrafter(Drafter):
    """The baseline (`drafter=None`)."""

    capturable = True

    def spec(self, sampling: Sampling) -> TreeSpec:
        return TreeSpec(frozenset({Law.POINT}), nodes=1, depth=0, width=0, by_depth=True)

    def propose(self, context: Context, coins: Coins) -> DraftTree:
        return root_only(context.root)
