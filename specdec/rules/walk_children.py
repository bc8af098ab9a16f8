"""The way from the root downwards for rules that decide one node after the other, for every row at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.coins import Coins, Purpose, inverse_cdf
from specdec.rules.base import Decisions
from specdec.rules.children import Siblings
from specdec.target_law import TargetLaw
from specdec.tree import DraftTree
from specdec_kernels.reference.nobody import nobody

# (siblings, target law [batch, vocab], coins of the siblings [batch, width], rows still on their way [batch] bool)
# -> (accepted child, 0 where there is none [batch] int64; law owed where there is none [batch, vocab])
TryChildren = Callable[[Siblings, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def top_down(tree: DraftTree, target_law: TargetLaw, coins: Coins, try_children: TryChildren) -> Decisions:
    """Accept children from the root downwards, until none is accepted or a leaf is reached."""
    rows = torch.arange(len(tree.tokens), device=tree.tokens.device)
    node = torch.zeros_like(rows)  # [batch] int64: the deepest accepted node
    accepted, alive = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    coin = coins.uniforms(Purpose.ACCEPT)
    owed, path = target_law.at(node), [node]  # owed: [batch, vocab], what the target law still owes at `node`
    for _ in range(tree.topology.depth):
        siblings = Siblings(tree, node, owed.dtype)
        child, rest = try_children(siblings, owed, coin.gather(1, siblings.index), alive)
        alive = child > 0
        if nobody(alive):
            owed = rest
            break
        node = torch.where(alive, child, node)
        owed = torch.where(alive[:, None], target_law.at(node), rest)
        accepted = accepted + alive
        path.append(node)
    emit = coins.uniforms(Purpose.EMIT)[rows, node]
    return Decisions(torch.stack(path, 1), accepted, inverse_cdf(owed, emit))
