"""The base of networks that draft from the target's states, and the parts of the target that they may use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.models.level import Level


@dataclass(frozen=True, eq=False)
class TargetParts:
    """What a network may use of the target."""

    embedding: nn.Module
    lm_head: Any
    dtype: torch.dtype  # the network's

    @classmethod
    def of(cls, model: PreTrainedModel, net: nn.Module) -> TargetParts:
        """Those for this network."""
        return cls(model.get_input_embeddings(), model.get_output_embeddings(), next(net.parameters()).dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """[..., hidden] in the network's dtype, for tokens [...] int64."""
        return self.embedding(tokens).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., vocab], for what the LM head reads, [..., hidden]."""
        # `device_map` may put the head elsewhere
        return self.lm_head(hidden.to(self.lm_head.weight.dtype)).to(hidden.device)


class StatesNet(nn.Module, ABC):
    """A network that drafts from the target's states. It keeps nothing of a text: its passes are given a `Level`.

    Attributes:
        states: which of the target's states it reads: see `Drafter.states`.
        state_size: size of each of these.
        kept: size of what is kept of a position.
        vocab: how many tokens it can draft; None: all of the target's.
        target_ids: [vocab] int64: the target's ids of these tokens; None if they are the target's first.
        attention: (heads of keys and values, size of a head) of each of its layers with a cache.
        values: the same of their values, where these are shaped unlike the keys.
        slots: how many nodes its pass over a block has, which are no nodes of the tree; 0 for no such pass.

    Class attributes:
        ahead: how many places after a position the token is that it is read with.
    """

    states: tuple[int, ...]
    state_size: int
    kept: int
    vocab: int | None = None
    target_ids: Tensor | None
    attention: Sequence[tuple[int, int]] = ()
    values: Sequence[tuple[int, int]] | None = None
    slots: int = 0
    ahead: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("target_ids", None)  # moves with the network

    @abstractmethod
    def follow(self, tokens: Tensor, states: Tensor, level: Level, target: TargetParts) -> Tensor:
        """Read positions of the text.

        Args:
            tokens: [batch, n] int64: the tokens `ahead` places after them.
            states: [batch, n, state, state_size]: the target's states there.
            level: the positions, as attention sees them.
            target: parts of the target.

        Returns:
            [batch, n, kept]: what is kept of each position while it is the last.
        """

    def readings(self, layers: int) -> Iterator[tuple[str, StatesNet]]:
        """Other ways in which its file may have been meant, for a target of so many layers: (what differs, the network so)."""
        for shift in (-1, 1):
            states = tuple(i + shift if i >= 0 else i for i in self.states)
            if (
                states != self.states
                and all(-1 <= i < layers for i in states)
                and states.count(-1) == self.states.count(-1)
            ):
                yield f"states {states}, one layer {'earlier' if shift < 0 else 'later'}", self.changed(states=states)
        if len(self.states) > 1:
            yield f"states {self.states[::-1]}, in reverse order", self.changed(states=self.states[::-1])

    def changed(self, **attributes: Any) -> Any:
        """The same network, with the same weights, but for these attributes."""
        made = copy(self)
        for name, value in attributes.items():
            setattr(made, name, value)
        return made

    def over_target(self, logits: Tensor, vocab: int) -> Tensor:
        """[..., vocab]: logits over all of the target's tokens, for [..., vocab of the network]: -inf for those it lacks."""
        if self.target_ids is None:
            return logits
        return logits.new_full((*logits.shape[:-1], vocab), -torch.inf).index_copy_(-1, self.target_ids, logits)
