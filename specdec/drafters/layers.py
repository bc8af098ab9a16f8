"""Layers of the networks that drafters bring along: those of Llama and Qwen3, over a `Level`, named as in checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from specdec.models.level import Level


class Norm(LlamaRMSNorm):
    """RMSNorm with a weight."""


class MLP(LlamaMLP):
    """SwiGLU."""


class Rotary(LlamaRotaryEmbedding):
    """Rotary position embeddings (cos, sin) of positions [batch, n], by a config's `rope_parameters`.

    Frequencies stay in float32 when the network is given another dtype: rounded, they would move far positions.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
        frequencies = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = frequencies.to(self.inv_freq.device)
        return self


class Attention(nn.Module):
    """Attention with rotary embeddings.

    Args:
        config: a transformers config, of Llama or Qwen3.
        layer: which layer of the network it is in.
        width: size of its input; by default that of its output.
        head_norms: whether queries and keys are normed, as in Qwen3.
    """

    def __init__(self, config: Any, layer: int, width: int | None = None, head_norms: bool = False):
        super().__init__()
        hidden, size = config.hidden_size, head_size(config)
        self.layer, self.size = layer, size
        wide: int = hidden if width is None else width
        bias = bool(getattr(config, "attention_bias", False))
        self.q_proj = nn.Linear(wide, config.num_attention_heads * size, bias)
        self.k_proj = nn.Linear(wide, config.num_key_value_heads * size, bias)
        self.v_proj = nn.Linear(wide, config.num_key_value_heads * size, bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias)
        self.q_norm, self.k_norm = (Norm(size, config.rms_norm_eps) if head_norms else nn.Identity() for _ in range(2))

    def heads(self, x: Tensor) -> Tensor:
        """[batch, head, n, size], of [batch, n, heads * size]."""
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return rotated(self.q_norm(self.heads(self.q_proj(x))), rope)

    def keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return rotated(self.k_norm(self.heads(self.k_proj(x))), rope)

    def values(self, x: Tensor) -> Tensor:
        return self.heads(self.v_proj(x))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], level: Level, window: int | None = None) -> Tensor:
        """[batch, n, hidden], of [batch, n, width] and the rotary embeddings of `level.positions`."""
        found = level.attend(self.layer, self.queries(x, rope), self.keys(x, rope), self.values(x), window=window)
        return self.o_proj(found.flatten(2))

    def remember(self, x: Tensor, rope: tuple[Tensor, Tensor], level: Level) -> None:
        """Only add keys and values of [batch, n, width] to the level's."""
        level.add(self.layer, self.keys(x, rope), self.values(x))


class Layer(nn.Module):
    """A layer: attention and an MLP, each of which reads the normed stream and adds to it.

    Args:
        config, layer, width, head_norms: as for `Attention`. `config.layer_types`, if there, say which layers see a window.
        input_norm: whether what attention reads is normed.
        causal: whether it lets nodes of a block see only those before them.
    """

    def __init__(
        self,
        config: Any,
        layer: int,
        width: int | None = None,
        head_norms: bool = False,
        input_norm: bool = True,
        causal: bool = False,
    ):
        super().__init__()
        self.causal = causal
        hidden, eps, types = config.hidden_size, config.rms_norm_eps, getattr(config, "layer_types", None)
        self.window = config.sliding_window if types and types[layer] == "sliding_attention" else None
        self.self_attn, self.mlp = Attention(config, layer, width, head_norms), MLP(config)
        self.input_layernorm = Norm(hidden, eps) if input_norm else nn.Identity()
        self.post_attention_layernorm = Norm(hidden, eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], level: Level) -> Tensor:
        return self.add(x, self.input_layernorm(x), rope, level)

    def add(self, x: Tensor, read: Tensor, rope: tuple[Tensor, Tensor], level: Level) -> Tensor:
        """[batch, n, hidden]: the stream after this layer, of the stream [batch, n, hidden] and what attention reads of it."""
        x = x + self.self_attn(read, rope, level.causal if self.causal else level, self.window)
        return x + self.mlp(self.post_attention_layernorm(x))


def rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    return apply_rotary_pos_emb(x, x, *rope)[0]


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
