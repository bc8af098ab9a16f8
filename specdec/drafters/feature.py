"""Drafters that read pairs of a token and the state before it, and go on from their own outputs: EAGLE, MTP."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.drafters.states_drafter import StatesDrafter, StatesRun
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.models.level import Level
from specdec.models.target import ModelTargetRun
from specdec.trees.base import Frontier


class FeatureNet(StatesNet):
    """A network over pairs of a token and a feature of the position before it.

    The pair at position i is (token i + 1, feature of position i), and its output gives the law of token i + 2. In the text a
    feature is made of the target's states; in the tree it is the network's own output for the parent. Outputs are as large as
    features: `kept`.
    """

    ahead: ClassVar[int] = 1

    @abstractmethod
    def project(self, states: Tensor) -> Tensor:
        """[batch, n, kept]: features, of the target's states [batch, n, state, state_size]."""

    @abstractmethod
    def step(self, tokens: Tensor, features: Tensor, level: Level, target: TargetParts) -> Tensor:
        """[batch, n, kept]: outputs for pairs of tokens [batch, n] int64 and features [batch, n, kept]."""

    @abstractmethod
    def logits(self, outputs: Tensor, target: TargetParts) -> Tensor:
        """[batch, n, vocab], of outputs [batch, n, kept]."""

    def follow(self, tokens: Tensor, states: Tensor, level: Level, target: TargetParts) -> Tensor:
        return self.step(tokens, self.project(states), level, target)


class FeatureDrafter(StatesDrafter):
    """Drafts with a `FeatureNet`, one pass for each level of the tree but the first.

    What is read of the text is one pass over the kept nodes after every step; its output at the root gives the first level.
    A text of one token has no pair yet: until it grows, its drafts are guesses from zeros.
    """

    kind = FeatureNet
    net: FeatureNet

    def _run(self, net: FeatureNet, target: ModelTargetRun, batch: Batch, last: StatesRun | None) -> StatesRun:
        return FeatureRun(self, net, target, batch, last)


class FeatureRun(StatesRun):
    """A `FeatureNet` at work. The pair of the root is node 0 of the tree, behind the committed slots."""

    net: FeatureNet

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        # [batch, nodes, kept]: of all nodes asked for; captured graphs write to it in place
        self._outputs = torch.zeros(len(self.last), self._nodes, self.net.kept).to(self.last)

    def score(self, frontier: Frontier) -> Tensor:
        asked, count = frontier.topology.parents.shape[1], frontier.tokens.shape[1]
        if frontier.topology.depth == 0:
            outputs = self.last[:, None]
        else:
            parents = frontier.topology.parents[:, -count:, None].expand(-1, -1, self.net.kept)
            features, level = self._outputs.gather(1, parents), self.level(frontier.topology, count)
            outputs = self.net.step(frontier.tokens, features, level, self.parts)
            if outputs.shape != features.shape:
                raise ValueError(
                    f"{type(self.net).__name__}.step returned {list(outputs.shape)}; return as much as it is given of each "
                    f"feature, {list(features.shape)}."
                )
        self._outputs[:, asked - count : asked] = outputs
        return self.net.over_target(self.net.logits(outputs, self.parts), self.batch.vocab)
