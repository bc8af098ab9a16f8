"""Drafters that compute a block of tokens in one pass, whatever the tree: Medusa, DFlash, DSpark."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from specdec.batch import Batch
from specdec.drafters.states_drafter import StatesDrafter, StatesNet, StatesRun, TargetParts
from specdec.models.level import Level
from specdec.models.target import ModelTargetRun
from specdec.sampling import Sampling
from specdec.tree import TreeSpec, block
from specdec.trees.base import Frontier


class BlockNet(StatesNet):
    """A network that computes the laws of all depths at once.

    Attributes:
        depth: how many tokens a pass drafts.
    """

    depth: int

    @abstractmethod
    def block(self, root: Tensor, last: Tensor, level: Level, depth: int, target: TargetParts) -> Tensor:
        """The pass of a step.

        Args:
            root: [batch] int64: the last token of each text.
            last: [batch, kept]: what was kept of the position before it.
            level: `slots` nodes from the root on, which see the text and each other.
            depth: how many depths are wanted.
            target: parts of the target.

        Returns:
            [batch, depth, vocab]: logits of the tokens 1, 2, ... places after the root.
        """

    def logits(self, base: Tensor, tokens: Tensor) -> Tensor:
        """[batch, n, vocab]: logits after nodes with these tokens [batch, n] int64; `base`, what the pass gave for them."""
        return base


class BlockDrafter(StatesDrafter):
    """Drafts with a `BlockNet`: one pass in all, for any tree no deeper than its block."""

    net: BlockNet

    def spec(self, sampling: Sampling) -> TreeSpec:
        spec = super().spec(sampling)
        if spec.depth > self.net.depth:
            raise ValueError(
                f"{self} drafts {self.net.depth} tokens at most; use a tree no deeper than that, not {spec.depth}."
            )
        return spec

    def _run(self, net: BlockNet, target: ModelTargetRun, batch: Batch, last: StatesRun | None) -> StatesRun:
        return BlockRun(self, net, target, batch, last)


class BlockRun(StatesRun):
    """A `BlockNet` at work."""

    net: BlockNet

    def __init__(self, *parts: object):
        super().__init__(*parts)  # type: ignore[arg-type]
        self._block = block(len(self.batch), self.net.slots, self.batch.device)
        self._base: Tensor | None = None  # [batch, depth, vocab]; captured graphs write to it in place

    def prepare(self, frontier: Frontier) -> tuple[int, int]:
        if frontier.topology.depth == 0:
            self._deepest = min(self.tree.policy.spec(self.batch.sampling).depth, self.batch.max_depth)
        return self.batch.longest, self._deepest

    def score(self, frontier: Frontier) -> Tensor:
        if frontier.topology.depth == 0:
            level = self.level(self._block, self.net.slots)
            base = self.net.block(self.batch.root, self.last, level, self._deepest, self.parts)
            if self._base is None:
                self._base = base.new_zeros(len(base), self.net.depth, base.shape[2])
            self._base[:, : self._deepest] = base
        assert self._base is not None
        depths = frontier.topology.depths[:, -frontier.tokens.shape[1] :, None].expand(-1, -1, self._base.shape[2])
        logits = self.net.logits(self._base.gather(1, depths), frontier.tokens)
        return self.net.over_target(logits, self.batch.vocab)
