"""EAGLE-3: one layer drafts from three of the target's states and the next token (Li et al., arXiv:2503.01840)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafters.checkpoints import filled, write_checkpoint
from specdec.drafters.eagle3_export import exported
from specdec.drafters.eagle3_files import Eagle3Reading, read_eagle3
from specdec.drafters.feature import FeatureDrafter, FeatureNet
from specdec.drafters.layers import Layer, Norm, Rotary, head_size
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.models.level import Level
from specdec.trees.base import TreePolicy


class FirstLayer(Layer):
    """The first layer reads the token beside the feature."""

    def __init__(self, config: Any, head_norms: bool):
        super().__init__(config, 0, 2 * config.hidden_size, head_norms)
        self.hidden_norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, token: Tensor, rope: Any, level: Level, norm_before_residual: bool) -> Tensor:  # type: ignore[override]
        normed = self.hidden_norm(x)
        both = torch.cat([self.input_layernorm(token), normed], -1)
        return self.add(normed if norm_before_residual else x, both, rope, level)


class Eagle3Net(FeatureNet):
    """The network. Its modules are named as in published files.

    Args:
        config: a Llama or Qwen3 config of the draft, with its number of layers; `vocab_size` is the target's.
        states: which of the target's states it reads.
        state_size: size of these.
        vocab: tokens that it drafts; None to use the target's LM head. Set `target_ids` if these are not the first.
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
        self.config, self.states, self.state_size, self.reading = config, tuple(states), state_size, reading
        hidden, eps, width = config.hidden_size, config.rms_norm_eps, len(self.states) * state_size
        self.kept, self.vocab, self.head_norms, self.norms = hidden, vocab, head_norms, norms
        later = [Layer(config, i, head_norms=head_norms) for i in range(1, config.num_hidden_layers)]
        self.layers = nn.ModuleList([FirstLayer(config, head_norms), *later])
        self.attention = [(config.num_key_value_heads, head_size(config))] * len(self.layers)
        self.fc, self.norm, self.rotary = nn.Linear(width, hidden, bias=False), Norm(hidden, eps), Rotary(config)
        self.fc_norm = nn.ModuleList(Norm(state_size, eps) for _ in states) if norms == "fc_norm" else None
        self.input_norm = Norm(width, eps) if norms == "input_norm" else None
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
        token = target.embed(tokens) if self.embed_tokens is None else self.embed_tokens(tokens)
        rope = self.rotary(features, level.positions)
        x = self.layers[0](features, token, rope, level, self.reading.norm_before_residual)
        for layer in self.layers[1:]:  # type: ignore[union-attr]
            x = layer(x, rope, level)
        return self.norm(x) if self.reading.norm_output else x

    def logits(self, outputs: Tensor, target: TargetParts) -> Tensor:
        x = outputs if self.reading.norm_output else self.norm(outputs)
        return target.logits(x) if self.lm_head is None else self.lm_head(x)


class Eagle3Drafter(FeatureDrafter):
    """Drafts with an EAGLE-3 network, along any tree, sampled with its laws or greedily."""

    kind = Eagle3Net
    net: Eagle3Net

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        target: PreTrainedModel,
        tree: TreePolicy | None = None,
        states: Sequence[int] | None = None,
        **reading: bool,
    ) -> Self:
        """A draft as the authors, SpecForge, Model-Optimizer, speculators or DeepSpec write it, in the target's dtype.

        Args:
            source: a folder, or a repository of the Hugging Face hub.
            target: the model that it was made for.
            tree: the tree policy; a chain of 4 by default.
            states: `Drafter.states` to read in place of those that the file names (see `specdec.drafters.eagle3_files`).
            reading: of `Eagle3Reading`, where the file is wrong.

        Raises:
            ValueError: files are missing, broken or of another kind, or the draft was made for another target.
        """
        file = read_eagle3(source, target, states)
        net = Eagle3Net(**file.arguments, reading=replace(file.reading, **reading))
        return cls(filled(net, file.tensors, file.target_ids, target, source), tree)

    def save_pretrained(
        self, folder: str | Path, format: str = "eagle3", target: PreTrainedModel | None = None
    ) -> None:
        """Write what `from_pretrained` and engines read: see `specdec.drafters.eagle3_export.exported`."""
        write_checkpoint(folder, *exported(self.net, format, target))
