"""Networks that draft from the target's states, run over whole texts at once: what training and checks compute with.

Training-time test (EAGLE-3, Li et al., arXiv:2503.01840) and random anchors (DFlash, DSpark) are both a pass over a given text
in which drafts see what they would see when served.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.block import BlockNet
from specdec.drafters.feature import FeatureNet
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.models.level import Level


class TextLevel(Level):
    """Nodes that see what a mask says, of their own and of an earlier level.

    Args:
        positions: [batch, n] int64.
        seen: [1 or batch, n, earlier + n] bool: what each node sees of the nodes of `before` and of this level.
        before: the earlier level, whose keys and values are added to.
    """

    def __init__(self, positions: Tensor, seen: Tensor, before: TextLevel | None = None):
        super().__init__(positions)
        self._seen, self._kept = seen, before._kept if before else {}
        self.all_positions = torch.cat([before.all_positions, positions], 1) if before else positions

    def repeated(self, times: int) -> TextLevel:
        """A level like this one with each row so many times, after one another."""
        made = TextLevel(self.positions.repeat_interleave(times, 0), self._seen)
        made._kept = {layer: tuple(t.repeat_interleave(times, 0) for t in pair) for layer, pair in self._kept.items()}
        return made

    @cached_property
    def causal(self) -> TextLevel:
        made = copy(self)  # with the same keys and values
        made._seen = self._seen & (self.all_positions[:, None] <= self.positions[:, :, None])
        return made

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self._kept:
            keys, values = self._kept[layer]
            key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        self._kept[layer] = key, value
        return key, value

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        seen = self._seen
        if window is not None:
            seen = seen & (self.positions[:, :, None] - self.all_positions[:, None] < window)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


def unroll(net: FeatureNet, tokens: Tensor, states: Tensor, target: TargetParts, steps: int) -> Iterator[Tensor]:
    """The laws of drafts that follow a text, depth by depth: those of training-time test.

    Args:
        net: the network; gradients flow through it.
        tokens: [batch, t] int64.
        states: [batch, t, state, state_size]: the target's, at all positions.
        target: parts of the target.
        steps: how deep.

    Yields:
        for s = 0, 1, ...: [batch, t - steps, vocab] logits: in row i, of token i + 2 + s, after s drafts that were those of the
        text. They attend to the text's first i + 1 pairs and to the drafts before them, as in a tree.
    """
    batch, n = len(tokens), tokens.shape[1] - steps
    own = torch.eye(n, dtype=torch.bool, device=tokens.device)[None]
    seen, level, features = torch.ones_like(own).tril(), None, net.project(states[:, :n].to(target.dtype))
    for step in range(steps):
        positions = torch.arange(step, step + n, device=tokens.device).expand(batch, -1)
        level = TextLevel(positions, seen, level)
        features = net.step(tokens[:, 1 + step : 1 + step + n], features, level, target)
        yield net.logits(features, target)
        seen = torch.cat([seen, own], 2)


def blocks(net: BlockNet, tokens: Tensor, states: Tensor, target: TargetParts, anchors: Tensor) -> Tensor:
    """The laws of blocks that are drafted at places of a text, whose own tokens follow.

    Args:
        net: the network; gradients flow through it.
        tokens: [batch, t] int64.
        states: [batch, t, state, state_size]: the target's, at all positions.
        target: parts of the target.
        anchors: [batch, n] int64: the places of roots, at least 1 and at most t - depth: the text must go on.

    Returns:
        [batch, n, depth, vocab] logits: at depth d, of the token d + 1 places after the anchor.
    """
    (batch, length), n = tokens.shape, anchors.shape[1]
    rows = torch.arange(batch, device=tokens.device).repeat_interleave(n)
    flat, every = anchors.flatten(), torch.arange(length, device=tokens.device)
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()[None]
    text = TextLevel(every.expand(batch, -1), causal)
    kept = net.follow(tokens, states.to(target.dtype), text, target)
    context = (every < flat[:, None])[:, None].expand(-1, net.slots, -1)
    seen = torch.cat([context, context.new_ones(batch * n, net.slots, net.slots)], 2)
    level = TextLevel(flat[:, None] + torch.arange(net.slots, device=tokens.device), seen, text.repeated(n))
    base = net.block(tokens[rows, flat], kept[rows, flat - 1], level, net.depth, target)
    places = flat[:, None] + torch.arange(net.depth, device=tokens.device)
    return net.logits(base, tokens[rows[:, None], places]).unflatten(0, (batch, n))


def drafts_along(
    net: StatesNet, tokens: Tensor, states: Tensor, target: TargetParts, depth: int, anchors: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The laws of drafts at many places of a text, whatever the network.

    Args:
        net: the network; gradients flow through it.
        tokens: [batch, t] int64.
        states: [batch, t, state, state_size]: the target's, at all positions.
        target: parts of the target.
        depth: how deep; at most as deep as a block.
        anchors: [batch, n] int64: the places of roots, for a `BlockNet`; None for all places that the text goes on after.

    Returns:
        the places of roots, [batch, n] int64, and by depth d from 0 on the logits [batch, n, vocab] of the token d + 1 places
        after them.
    """
    deepest = net.depth if isinstance(net, BlockNet) else depth
    if anchors is None:
        anchors = torch.arange(1, tokens.shape[1] - deepest + 1, device=tokens.device).expand(len(tokens), -1)
    if isinstance(net, BlockNet):
        return anchors, list(blocks(net, tokens, states, target, anchors)[:, :, :depth].unbind(2))
    assert isinstance(net, FeatureNet)
    return anchors, list(unroll(net, tokens, states, target, depth))


@torch.no_grad()
def read_texts(model: PreTrainedModel, tokens: Tensor, which: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The target's states [batch, t, state, hidden] and logits [batch, t, vocab] over texts [batch, t] int64 of one length.

    In a plain forward pass, by transformers' own `output_hidden_states`.
    """
    head: list[Tensor] = []
    lm_head: Any = model.get_output_embeddings()
    hook = lm_head.register_forward_pre_hook(lambda _, args: head.append(args[0]))
    try:
        out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    finally:
        hook.remove()
    return torch.stack([head[0] if index == -1 else out.hidden_states[index] for index in which], 2), out.logits
