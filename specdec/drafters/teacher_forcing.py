"""Networks that draft from the target's states, run over whole texts at once: what training and checks compute with.

Training-time test (EAGLE-3, Li et al., arXiv:2503.01840) and random anchors (DFlash, DSpark) are both a pass over a given text
in which drafts see what they would see when served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.drafters.block import BlockNet
from specdec.drafters.feature import FeatureNet
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.drafters.text_level import BlocksLevel, TextLevel


class Drafted(NamedTuple):
    """What is drafted one depth below places of texts.

    Args:
        logits: [batch, n, vocab].
        confidence: [batch, n]: how probably the draft is accepted; None if the network does not tell.
    """

    logits: Tensor
    confidence: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Drafts:
    """What a network drafts along texts, at many places of each. Laws over a large vocabulary are made some places at a time.

    Args:
        roots: [batch, n] int64: the places.
        at: by depth d, what is drafted for the token d + 1 places after some of the roots; gradients flow to the network.
    """

    roots: Tensor
    at: Callable[[slice], list[Drafted]]


def drafts_along(
    net: StatesNet, tokens: Tensor, states: Tensor, target: TargetParts, depth: int, anchors: Tensor | None = None
) -> Drafts:
    """What a network of any kind drafts along texts, when the text's own tokens are drawn.

    Args:
        net: the network; gradients flow through it.
        tokens: [batch, t] int64.
        states: [batch, t, state, state_size]: the target's, at all positions.
        target: parts of the target.
        depth: how deep; at most as deep as a block.
        anchors: [batch, n] int64: the places of roots, for a `BlockNet`, at least 1 and at most t - depth; None for all places
            that the text goes on after.
    """
    if isinstance(net, BlockNet):
        return _block_drafts(net, tokens, states, target, depth, anchors)
    assert isinstance(net, FeatureNet)
    outputs = list(unroll(net, tokens, states, target, depth))
    roots = torch.arange(1, outputs[0].shape[1] + 1, device=tokens.device).expand(len(tokens), -1)
    return Drafts(roots, lambda part: [Drafted(net.logits(found[:, part], target)) for found in outputs])


def _block_drafts(
    net: BlockNet, tokens: Tensor, states: Tensor, target: TargetParts, depth: int, anchors: Tensor | None
) -> Drafts:
    """The network reads each text once, and drafts blocks at its places."""
    (batch, length), device = tokens.shape, tokens.device
    every = torch.arange(length, device=device)
    text = TextLevel(every.expand(batch, -1), (every <= every[:, None])[None])
    kept = net.follow(tokens, states.to(target.dtype), text, target)
    roots = every[1 : length - depth + 1].expand(batch, -1) if anchors is None else anchors

    def by_depth(found: Tensor) -> tuple[Tensor, ...]:
        return found.unflatten(0, (batch, -1)).unbind(2)

    def at(part: slice) -> list[Drafted]:
        some = roots[:, part]
        rows, places = torch.arange(batch, device=device).repeat_interleave(some.shape[1]), some.flatten()
        level = BlocksLevel(text, some, net.slots)
        found = net.block(tokens[rows, places], kept[rows, places - 1], level, depth, target)
        # [batch * n, depth]: the token above each draft
        above = tokens[rows[:, None], places[:, None] + torch.arange(depth, device=device)]
        logits = by_depth(net.logits(found, above))
        if not net.confident:
            return [Drafted(each) for each in logits]
        # A confidence tells of the laws, and does not change them.
        confidence = by_depth(net.confidence(found.detached(), above))
        return [Drafted(*each) for each in zip(logits, confidence, strict=True)]

    return Drafts(roots, at)


def unroll(net: FeatureNet, tokens: Tensor, states: Tensor, target: TargetParts, steps: int) -> Iterator[Tensor]:
    """The outputs for drafts that follow a text, depth by depth: those of training-time test.

    Args:
        net: the network; gradients flow through it.
        tokens: [batch, t] int64.
        states: [batch, t, state, state_size]: the target's, at all positions.
        target: parts of the target.
        steps: how deep.

    Yields:
        for s = 0, 1, ...: [batch, t - steps, kept]: in row i, what gives the law of token i + 2 + s, after s drafts that were
        those of the text. They attend to the text's first i + 1 pairs and to the drafts before them, as in a tree.
    """
    batch, n = len(tokens), tokens.shape[1] - steps
    own = torch.eye(n, dtype=torch.bool, device=tokens.device)[None]
    seen, level, features = torch.ones_like(own).tril(), None, net.project(states[:, :n].to(target.dtype))
    for step in range(steps):
        positions = torch.arange(step, step + n, device=tokens.device).expand(batch, -1)
        level = TextLevel(positions, seen, level)
        features = net.step(tokens[:, 1 + step : 1 + step + n], features, level, target)
        yield features
        seen = torch.cat([seen, own], 2)
