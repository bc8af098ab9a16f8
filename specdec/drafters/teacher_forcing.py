"""Networks that draft from the target's states, run over whole texts at once: what training and checks compute with.

Training-time test (EAGLE-3, Li et al., arXiv:2503.01840) and random anchors (DFlash, DSpark) are both a pass over a given text
in which drafts see what they would see when served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.block import BlockNet, ByDepth
from specdec.drafters.feature import FeatureNet
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.models.level import Level


class TextLevel(Level):
    """Nodes that see what a mask says, of their own and of an earlier level.

    Args:
        positions: [batch, n] int64.
        seen: [1 or batch, n, earlier + n] bool: what each node sees of the nodes of `before` and of this level.
        before: the earlier level, whose pass is over.
    """

    def __init__(self, positions: Tensor, seen: Tensor, before: TextLevel | None = None):
        super().__init__(positions)
        self._seen, self._kept = seen, dict(before._kept) if before else {}
        self.all_positions = torch.cat([before.all_positions, positions], 1) if before else positions

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


class BlocksLevel(Level):
    """Blocks at places of texts that a network has read. Each sees its text up to there, and itself.

    Attention takes the blocks of a text together, so that the text's keys and values need no copy for each.

    Args:
        text: what the texts were read into.
        roots: [batch, n] int64: the place of each block's first slot.
        slots: of a block.
    """

    def __init__(self, text: TextLevel, roots: Tensor, slots: int):
        super().__init__((roots[..., None] + torch.arange(slots, device=roots.device)).flatten(0, 1))
        self._blocks = roots.shape  # (batch, n)
        which = torch.arange(roots.shape[1], device=roots.device).repeat_interleave(slots)
        before = text.positions[:, None] < roots.repeat_interleave(slots, 1)[..., None]
        own = (which == which[:, None]).expand(len(roots), -1, -1)
        self._together = TextLevel(self.positions.view(len(roots), -1), torch.cat([before, own], 2), text)

    @cached_property
    def causal(self) -> BlocksLevel:
        made = copy(self)
        made._together = self._together.causal
        return made

    def _joined(self, x: Tensor) -> Tensor:
        """[batch, head, n * slots, size], of [batch * n, head, slots, size]."""
        return x.unflatten(0, self._blocks).transpose(1, 2).flatten(2, 3)

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._together.add(layer, self._joined(key), self._joined(value))

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        return self._together.mask(dtype, window)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        found = super().attend(layer, self._joined(query), key, value, window)
        return found.unflatten(1, (self._blocks[1], -1)).flatten(0, 1)


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


class BlockTexts:
    """Texts that a network has read, to draft blocks at places of them.

    Args:
        net: the network; gradients flow through it.
        tokens: [batch, t] int64.
        states: [batch, t, state, state_size]: the target's, at all positions.
        target: parts of the target.
    """

    def __init__(self, net: BlockNet, tokens: Tensor, states: Tensor, target: TargetParts):
        every = torch.arange(tokens.shape[1], device=tokens.device)
        self.net, self.tokens, self.target = net, tokens, target
        self._text = TextLevel(every.expand(len(tokens), -1), (every <= every[:, None])[None])
        self._kept = net.follow(tokens, states.to(target.dtype), self._text, target)

    def blocks(self, anchors: Tensor, depth: int) -> tuple[ByDepth, Tensor]:
        """What is drafted when the text's own tokens are drawn.

        Args:
            anchors: [batch, n] int64: the places of roots, at least 1 and at most t - depth: the text must go on.
            depth: how deep.

        Returns:
            what the pass has found, [batch * n, depth, ...] each, and the tokens there, [batch * n, depth] int64: at depth d,
            for the token d + 1 places after the anchor and for the one before that.
        """
        net, (batch, n) = self.net, anchors.shape
        rows = torch.arange(batch, device=anchors.device).repeat_interleave(n)
        flat, level = anchors.flatten(), BlocksLevel(self._text, anchors, net.slots)
        found = net.block(self.tokens[rows, flat], self._kept[rows, flat - 1], level, depth, self.target)
        return found, self.tokens[rows[:, None], flat[:, None] + torch.arange(depth, device=flat.device)]


class Drafted(NamedTuple):
    """What is drafted one depth below places of texts.

    Args:
        logits: [batch, n, vocab].
        confidence: [batch, n]: how probably it is accepted, if the network tells.
    """

    logits: Tensor
    confidence: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Drafts:
    """What a network drafts along texts, at many places of each. Laws over a large vocabulary are made some places at a time.

    Args:
        roots: [batch, n] int64: the places.
        depth: how deep.
        at: by depth d, what is drafted for the token d + 1 places after some of the roots; gradients flow to the network.
    """

    roots: Tensor
    depth: int
    at: Callable[[slice], list[Drafted]]


def drafts_along(
    net: StatesNet, tokens: Tensor, states: Tensor, target: TargetParts, depth: int, anchors: Tensor | None = None
) -> Drafts:
    """What a network of any kind drafts along texts.

    Args:
        net: the network; gradients flow through it.
        tokens: [batch, t] int64.
        states: [batch, t, state, state_size]: the target's, at all positions.
        target: parts of the target.
        depth: how deep; at most as deep as a block.
        anchors: [batch, n] int64: the places of roots, for a `BlockNet`; None for all places that the text goes on after.
    """
    if isinstance(net, BlockNet):
        text, last = BlockTexts(net, tokens, states, target), tokens.shape[1] - depth
        roots = torch.arange(1, last + 1, device=tokens.device).expand(len(tokens), -1) if anchors is None else anchors

        def of_blocks(part: slice) -> list[Drafted]:
            found, before = text.blocks(roots[:, part], depth)
            sure = net.confidence(found.detached(), before) if net.confident else None
            whole = [net.logits(found, before), *([] if sure is None else [sure])]
            by_row = (each.unflatten(0, (len(tokens), -1)) for each in whole)
            return [Drafted(*each) for each in zip(*(each.unbind(2) for each in by_row), strict=True)]

        return Drafts(roots, depth, of_blocks)
    assert isinstance(net, FeatureNet)
    outputs = list(unroll(net, tokens, states, target, depth))
    roots = torch.arange(1, outputs[0].shape[1] + 1, device=tokens.device).expand(len(tokens), -1)
    return Drafts(roots, depth, lambda part: [Drafted(net.logits(found[:, part], target)) for found in outputs])


@torch.no_grad()
def read_texts(model: PreTrainedModel, tokens: Tensor, which: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The target's states [batch, t, state, hidden] over texts [batch, t] int64 of one length, and what its LM head reads.

    In a plain forward pass, by transformers' own `output_hidden_states`. Logits [batch, t, vocab] are not computed here: see
    `logits_of`.
    """
    read: list[Tensor] = []

    def last_only(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read.append(args[0])
        return (args[0][:, -1:],)

    with _before_head(model, last_only):
        out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    return torch.stack([read[0] if index == -1 else out.hidden_states[index] for index in which], 2), read[0]


@torch.no_grad()
def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[batch, n, vocab]: the model's logits, where its LM head reads `hidden` [batch, n, hidden].

    They are those of a forward pass over one token whose head is given these states, so whatever the model does to its logits
    (a scale, a cap) is done to them.
    """
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with _before_head(model, lambda _, args: (hidden.to(args[0]),)):
        return model(input_ids=one, use_cache=False).logits.to(hidden.device)


@contextmanager
def _before_head(model: PreTrainedModel, change: Callable[[Any, tuple[Tensor, ...]], Any]) -> Iterator[None]:
    head: Any = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(change)
    try:
        yield
    finally:
        hook.remove()
