"""EAGLE-3: one layer drafts from three of the target's states and the next token (Li et al., arXiv:2503.01840)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.feature import FeatureDrafter, FeatureNet
from specdec.drafters.layers import MLP, Attention, Norm, Rotary, head_size
from specdec.drafters.states_drafter import StatesNet, TargetParts
from specdec.models.level import Level


@dataclass(frozen=True)
class Eagle3Reading:
    """What files of EAGLE-3 drafts differ in and their tensors do not tell.

    Args:
        norm_before_residual: whether the first layer adds to the normed feature.
        norm_output: whether the normed output is the next feature (EAGLE-3.1).
    """

    norm_before_residual: bool = False
    norm_output: bool = False


class Layer(nn.Module):
    """A layer. The first reads the token beside the feature; later ones read the output of the one before."""

    def __init__(self, config: Any, layer: int, head_norms: bool):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, hidden if layer else 2 * hidden, head_norms)
        self.mlp, self.input_layernorm, self.post_attention_layernorm = (
            MLP(config),
            Norm(hidden, eps),
            Norm(hidden, eps),
        )
        if layer == 0:
            self.hidden_norm = Norm(hidden, eps)

    def forward(self, x: Tensor, token: Tensor | None, rope: Any, level: Level, norm_before_residual: bool) -> Tensor:
        if token is None:
            x = x + self.self_attn(self.input_layernorm(x), rope, level)
        else:
            normed = self.hidden_norm(x)
            both = torch.cat([self.input_layernorm(token), normed], -1)
            x = (normed if norm_before_residual else x) + self.self_attn(both, rope, level)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle3Net(FeatureNet):
    """The network. Its modules are named as in published files.

    Args:
        config: a Llama or Qwen3 config of the draft, with its number of layers.
        states: which of the target's states it reads.
        state_size: size of these.
        vocab: tokens that it drafts; None to use the target's LM head.
        reading: what files differ in.
        embedding: how many tokens its own embedding has; None to use the target's.
        head_norms: whether queries and keys are normed.
        norms: what is normed before the projection: nothing (""), each state ("fc_norm") or all in one ("input_norm").
    """

    def __init__(
        self,
        config: Any,
        states: Sequence[int],
        state_size: int,
        vocab: int | None = None,
        reading: Eagle3Reading = Eagle3Reading(),
        embedding: int | None = None,
        head_norms: bool = False,
        norms: str = "",
    ):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.config, self.states, self.state_size, self.vocab, self.reading = (
            config,
            tuple(states),
            state_size,
            vocab,
            reading,
        )
        self.kept, count = hidden, config.num_hidden_layers
        self.attention = [(config.num_key_value_heads, head_size(config))] * count
        self.layers = nn.ModuleList(Layer(config, i, head_norms) for i in range(count))
        self.fc, self.norm, self.rotary = (
            nn.Linear(len(states) * state_size, hidden, bias=False),
            Norm(hidden, eps),
            Rotary(config),
        )
        self.fc_norm = nn.ModuleList(Norm(state_size, eps) for _ in states) if norms == "fc_norm" else None
        self.input_norm = Norm(len(states) * state_size, eps) if norms == "input_norm" else None
        self.embed_tokens = None if embedding is None else nn.Embedding(embedding, hidden)
        self.lm_head = None if vocab is None else nn.Linear(hidden, vocab, bias=False)

    def readings(self, layers: int) -> Iterator[tuple[str, StatesNet]]:
        yield from super().readings(layers)
        for name in ("norm_before_residual", "norm_output"):
            flipped = not getattr(self.reading, name)
            yield f"{name}={flipped}", self.changed(reading=replace(self.reading, **{name: flipped}))

    def project(self, states: Tensor) -> Tensor:
        if self.fc_norm is not None:
            states = torch.stack([norm(states[:, :, i]) for i, norm in enumerate(self.fc_norm)], 2)
        x = states.flatten(2)
        return self.fc(x if self.input_norm is None else self.input_norm(x))

    def step(self, tokens: Tensor, features: Tensor, level: Level, target: TargetParts) -> Tensor:
        token = target.embed(tokens).to(features.dtype) if self.embed_tokens is None else self.embed_tokens(tokens)
        rope, x = self.rotary(features, level.positions), features
        for i, layer in enumerate(self.layers):
            x = layer(x, None if i else token, rope, level, self.reading.norm_before_residual)
        return self.norm(x) if self.reading.norm_output else x

    def logits(self, outputs: Tensor, target: TargetParts) -> Tensor:
        x = outputs if self.reading.norm_output else self.norm(outputs)
        return target.logits(x) if self.lm_head is None else self.lm_head(x)


class Eagle3Drafter(FeatureDrafter):
    """Drafts with an EAGLE-3 network, along any tree, sampled with its laws or greedily."""

    net: Eagle3Net
