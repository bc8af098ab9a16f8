"""Sibling rejection: one rule for every draft law.

With one sampled child it is speculative sampling (Leviathan et al., arXiv:2211.17192, algorithm 1; Chen et al.,
arXiv:2302.01318), with IID children SpecInfer's multi-step verification (arXiv:2305.09781, algorithm 2), without
replacement Sequoia's (arXiv:2402.12374, algorithm 2), with POINT children the sampling of EAGLE-2 (arXiv:2406.16858).

Why it is lossless: let r be the law still owed at a node (at first the target's own), and l the law that a child was drawn
from given what was drawn before. The child is accepted with mass min(r, l). After a rejection the law still owed is
(r - l)+, normalised. So the emitted token has law r whatever the children were. Induct over the children and then down the
tree: a child's subtree is verified against the target's law after that child.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import specdec_kernels
from specdec.coins import Coins, Purpose, RowCoins
from specdec.rules.base import Decision, Decisions, Rule
from specdec.rules.residual import residual
from specdec.target_law import RowLaw, TargetLaw
from specdec.tree import DraftTree, RowTree
from specdec_kernels.reference.verify import walk


@dataclass(frozen=True)
class SiblingRejection(Rule):
    """Try the children in the order they were drawn, each against the law that is still owed."""

    lossless = capturable = top_down = True
    lenience: ClassVar[float] = 1  # `LenientRejection` lowers it

    def decide(self, tree: RowTree, target_law: RowLaw, coins: RowCoins) -> Decision:
        path = [0]
        while True:
            p = target_law.probs(path[-1])
            for child, q in tree.draws(path[-1], len(p)):
                x = tree.tokens[child]
                if coins.accept(child, p[x] / (self.lenience * q[x])):
                    path.append(child)
                    break
                _, p = residual(1, p, q)
            else:
                return Decision(path, coins.pick(path[-1], p))

    def decide_batch(self, tree: DraftTree, target_law: TargetLaw, coins: Coins) -> Decisions:
        drafted = tree.tokens, tree.topology.children, tree.laws, tree.draft_probs
        given = *drafted, coins.uniforms(Purpose.ACCEPT), coins.uniforms(Purpose.EMIT), tree.topology.depth
        raw = target_law.raw()
        if raw is None or raw.logits.device.type not in specdec_kernels.DEVICES:
            return Decisions(*walk(target_law.at, *given, self.lenience))
        path, accepted, token, invalid = specdec_kernels.verify(raw.logits, *given, *raw.filters, self.lenience)
        raw.no_law.add_(invalid)
        return Decisions(path, accepted, token)
