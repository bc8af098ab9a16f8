"""Drafters that compute a block of tokens in one pass, whatever the tree: Medusa, DFlash, DSpark."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.coins import Coins
from specdec.drafters.states_drafter import StatesDrafter, StatesRun
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.models.level import Level
from specdec.models.target import ModelTargetRun
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec, block
from specdec.trees.base import Frontier, TreePolicy
from specdec.trees.widths import Chain


class ByDepth(NamedTuple):
    """What a pass has computed for each depth.

    Args:
        logits: [batch, depth, vocab]: of the tokens 1, 2, ... places after the root.
        states: [batch, depth, size]: what laws or confidences depend on besides; None if they do not.
    """

    logits: Tensor
    states: Tensor | None = None

    def at(self, depths: Tensor) -> ByDepth:
        """[batch, n, ...] each: for nodes at these depths [batch, n] int64, what is known of their children."""

        def chosen(part: Tensor) -> Tensor:
            return part.gather(1, depths[..., None].expand(-1, -1, part.shape[2]))

        return ByDepth(chosen(self.logits), None if self.states is None else chosen(self.states))

    def detached(self) -> ByDepth:
        """The same, through which no gradients flow."""
        return ByDepth(self.logits.detach(), None if self.states is None else self.states.detach())


class BlockNet(StatesNet):
    """A network that computes all depths at once.

    Attributes:
        depth: how many tokens a pass drafts.
        confident: whether it tells how probably a token is accepted.
    """

    depth: int
    confident: bool = False

    @abstractmethod
    def block(self, root: Tensor, last: Tensor, level: Level, depth: int, target: TargetParts) -> ByDepth:
        """The pass of a step.

        Args:
            root: [batch] int64: the last token of each text.
            last: [batch, kept]: what was kept of the position before it.
            level: `slots` nodes from the root on, which see the text and each other.
            depth: how many depths are wanted.
            target: parts of the target.
        """

    def logits(self, found: ByDepth, tokens: Tensor) -> Tensor:
        """[batch, n, vocab]: logits after nodes with tokens [batch, n] int64; `found` is what the pass has for each of them."""
        return found.logits

    def confidence(self, found: ByDepth, tokens: Tensor) -> Tensor:
        """[batch, n]: how probably the target accepts a child of each of these nodes, whatever its token; if `confident`."""
        raise NotImplementedError


class BlockDrafter(StatesDrafter):
    """Drafts with a `BlockNet`: one pass in all, for any tree no deeper than its block.

    Attributes:
        confidence: nodes whose children are less probably accepted than this, by the network's confidence, have none. It is
            known before a child's token is drawn, as it depends on the node and its ancestors alone, so that the law of what
            is drawn stays what the draft says. None: all nodes of the policy's tree are drafted.
    """

    kind = BlockNet
    net: BlockNet

    def __init__(self, net: BlockNet, tree: TreePolicy | None = None):
        super().__init__(net, tree)
        self.tree = Chain(net.depth) if tree is None else self.tree

    @property
    def confidence(self) -> float | None:
        return None

    def spec(self, sampling: Sampling) -> TreeSpec:
        spec = super().spec(sampling)
        if spec.depth > self.net.depth:
            raise ValueError(
                f"{self} drafts at most {self.net.depth} tokens, not {spec.depth}; use a tree no deeper than that."
            )
        return spec

    def _run(self, net: BlockNet, target: ModelTargetRun, batch: Batch, last: StatesRun | None) -> StatesRun:
        return BlockRun(self, net, target, batch, last)


class BlockRun(StatesRun):
    """A `BlockNet` at work. What captured graphs pass on to each other they write in place."""

    drafter: BlockDrafter
    net: BlockNet

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self._block = block(len(self.batch), self.net.slots, self.batch.device)
        self._found: ByDepth | None = None
        # [batch, nodes] bool: of all nodes asked for, those whose children are not confident enough
        self._stops = torch.zeros_like(self.asked, dtype=torch.bool)

    def prepare(self, frontier: Frontier) -> int:
        if frontier.topology.depth == 0:
            self._deepest = min(self.tree.policy.spec(self.batch.sampling).depth, self.batch.max_depth)
        return self._deepest

    def score(self, frontier: Frontier) -> Tensor:
        asked, count = frontier.topology.parents.shape[1], frontier.tokens.shape[1]
        if frontier.topology.depth == 0:
            level = self.level(self._block, self.net.slots)
            self._note(self.net.block(self.batch.root, self.last, level, self._deepest, self.parts))
        assert self._found is not None
        found = self._found.at(frontier.topology.depths[:, -count:])
        if self.drafter.confidence is not None:
            sure = self.net.confidence(found, frontier.tokens)
            self._stops[:, asked - count : asked] = sure < self.drafter.confidence
        return self.net.over_target(self.net.logits(found, frontier.tokens), self.batch.vocab)

    def _note(self, found: ByDepth) -> None:
        def room(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.new_zeros(len(part), self.net.depth, part.shape[2])

        if self._found is None:
            self._found = ByDepth(*map(room, found))  # type: ignore[arg-type]
        for place, part in zip(self._found, found, strict=True):
            if place is not None and part is not None:
                place[:, : self._deepest] = part

    def propose(self, coins: Coins) -> DraftTree:
        tree = super().propose(coins)
        if self.drafter.confidence is None:
            return tree
        asked = self.asked[:, : tree.tokens.shape[1]]
        tree = tree.without_below((asked >= 0) & self._stops.gather(1, asked.clamp(min=0)))
        # where nothing is captured, the target need not score nodes that no row has
        return tree if self.batch.static else tree.trimmed()
