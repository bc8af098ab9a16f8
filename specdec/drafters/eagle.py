"""EAGLE-1 and 2: a layer extends the last hidden states (Li et al., arXiv:2401.15077; 2406.16858, with `trees.Dynamic`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.checks import check_kind
from specdec.drafters.checkpoints import filled, naming, read_checkpoint, write_checkpoint
from specdec.drafters.feature import FeatureDrafter, FeatureNet
from specdec.drafters.layers import Layer, Rotary, head_size
from specdec.drafters.shapes import layer_config, leave_copies, own_embedding
from specdec.drafters.states_net import TargetParts
from specdec.models.level import Level
from specdec.trees.base import TreePolicy


class EagleNet(FeatureNet):
    """The network. Its modules are named as in published files.

    Args:
        config: a Llama config of the draft, with its number of layers.
        bias: whether the projection has one.
        embedding: how many tokens its own embedding has; None to use the target's.
    """

    def __init__(self, config: Any, bias: bool = True, embedding: int | None = None):
        super().__init__()
        self.states, self.state_size, self.kept = (-1,), config.hidden_size, config.hidden_size
        self.config, self.fc, self.rotary = config, nn.Linear(2 * self.kept, self.kept, bias), Rotary(config)
        self.layers = nn.ModuleList(Layer(config, i, input_norm=i > 0) for i in range(config.num_hidden_layers))
        self.attention = [(config.num_key_value_heads, head_size(config))] * len(self.layers)
        self.embed_tokens = None if embedding is None else nn.Embedding(embedding, self.kept)

    def project(self, states: Tensor) -> Tensor:
        return states[:, :, 0]

    def step(self, tokens: Tensor, features: Tensor, level: Level, target: TargetParts) -> Tensor:
        token = target.embed(tokens) if self.embed_tokens is None else self.embed_tokens(tokens)
        rope, x = self.rotary(features, level.positions), self.fc(torch.cat([token, features], -1))
        for layer in self.layers:
            x = layer(x, rope, level)
        return x

    def logits(self, outputs: Tensor, target: TargetParts) -> Tensor:
        return target.logits(outputs)


class EagleDrafter(FeatureDrafter):
    """Drafts with an EAGLE-1 or EAGLE-2 network, along any tree, sampled with its laws or greedily."""

    kind = EagleNet
    net: EagleNet

    @classmethod
    def from_pretrained(cls, source: str | Path, target: PreTrainedModel, tree: TreePolicy | None = None) -> Self:
        """A draft as its authors write it, in the target's dtype.

        Args:
            source: a folder, or a repository of the Hugging Face hub.
            target: the model that it was made for.
            tree: the tree policy; a chain of 4 by default.

        Raises:
            ValueError: files are missing, broken or of another kind, or the draft was made for another target.
        """
        check_kind("target", target, PreTrainedModel, "pass the model that it drafts for")
        keys, tensors = read_checkpoint(source)
        with naming(source):
            net = _net(keys, tensors, target)
        return cls(filled(net, tensors, None, target, source), tree)

    def save_pretrained(self, folder: str | Path, *, target: PreTrainedModel | None = None) -> None:
        """Write the authors' layout, which vLLM and SGLang read. The target is not asked for anything."""
        keys = {
            **self.net.config.to_dict(),
            "bias": self.net.fc.bias is not None,
            "architectures": ["LlamaForCausalLMEagle"],
        }
        write_checkpoint(folder, keys, dict(self.net.state_dict()))


def _net(keys: dict[str, Any], tensors: dict[str, Tensor], target: PreTrainedModel) -> EagleNet:
    """A network of the shapes of these tensors; copies of the target's are left out of them."""
    goal = target.config.get_text_config()
    fc, query = tensors.get("fc.weight"), tensors.get("layers.0.self_attn.q_proj.weight")
    if fc is None or query is None or query.shape[1] != len(fc):
        raise ValueError(
            "it has no fc and first layer of EAGLE-1 or EAGLE-2; is it an EAGLE-3 draft, of Eagle3Drafter?"
        )
    if len(fc) != goal.hidden_size:
        raise ValueError(
            f"it extends states of size {len(fc)}, the target's have {goal.hidden_size}; use another draft."
        )
    leave_copies(tensors, target)
    # The authors' code takes the base of the positions from no file.
    own = {key: value for key, value in keys.items() if not key.startswith("rope_")}
    config = layer_config(own, tensors, len(fc), goal.vocab_size)
    return EagleNet(config, "fc.bias" in tensors, own_embedding(tensors, len(fc), goal))
