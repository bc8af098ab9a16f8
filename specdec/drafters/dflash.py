"""DFlash: layers that read the target's states as keys and values fill in a block of masks (arXiv:2602.06036)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.checks import check_kind
from specdec.drafters.block import BlockDrafter, BlockNet, ByDepth
from specdec.drafters.block_export import write_block_file
from specdec.drafters.block_files import BlockFile, BlockReading, block_file
from specdec.drafters.checkpoints import filled, naming, read_checkpoint
from specdec.drafters.layers import Layer, Norm, Rotary, head_size
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.models.level import Level
from specdec.models.stored_layers import rows_of
from specdec.trees.base import TreePolicy


class DFlashNet(BlockNet):
    """The network. Its modules are named as in published files.

    Args:
        config: a Llama or Qwen3 config of the draft, with its number of layers, and `layer_types` if some see a window.
        states: which of the target's states it reads.
        state_size: size of these.
        slots: size of a block, the root included.
        mask_token: the token whose embedding stands in the slots after the root.
        vocab: tokens that it drafts; None to use the target's LM head.
        embedding: how many tokens its own embedding has; None to use the target's.
        reading: what files differ in.
    """

    def __init__(
        self,
        config: Any,
        states: Sequence[int],
        state_size: int,
        slots: int,
        mask_token: int,
        vocab: int | None = None,
        embedding: int | None = None,
        reading: BlockReading = BlockReading(),
    ):
        super().__init__()
        hidden, eps, count = config.hidden_size, config.rms_norm_eps, config.num_hidden_layers
        self.config, self.states, self.state_size, self.reading = config, tuple(states), state_size, reading
        self.slots, self.mask_token, self.vocab, self.kept = slots, mask_token, vocab, 0
        self.depth = slots if reading.from_anchor else slots - 1
        self.attention = [(config.num_key_value_heads, head_size(config))] * count
        self.fc = nn.Linear(len(states) * state_size, hidden, bias=False)
        self.hidden_norm, self.norm, self.rotary = Norm(hidden, eps), Norm(hidden, eps), Rotary(config)
        causal = reading.causal or [False] * count
        self.layers: Any = nn.ModuleList(Layer(config, i, head_norms=True, causal=causal[i]) for i in range(count))
        self.embed_tokens = None if embedding is None else nn.Embedding(embedding, hidden)
        self.lm_head = None if vocab is None else nn.Linear(hidden, vocab, bias=False)

    def readings(self, layers: int) -> Iterator[tuple[str, StatesNet]]:
        yield from super().readings(layers)
        reading = replace(self.reading, from_anchor=not self.reading.from_anchor)
        depth = self.slots if reading.from_anchor else self.slots - 1
        yield f"sample_from_anchor={reading.from_anchor}", self.changed(reading=reading, depth=depth)

    def follow(self, tokens: Tensor, states: Tensor, level: Level, target: TargetParts) -> Tensor:
        context = self.hidden_norm(self.fc(states.flatten(2)))
        rope = self.rotary(context, level.positions)
        for layer in self.layers:
            layer.self_attn.remember(context, rope, level)
        return context[..., :0]

    def block(self, root: Tensor, last: Tensor, level: Level, depth: int, target: TargetParts) -> ByDepth:
        masks = root.new_full((len(root), self.slots - 1), self.mask_token)
        x = self._embedded(torch.cat([root[:, None], masks], 1), target)
        rope, first = self.rotary(x, level.positions), self.slots - self.depth
        for layer in self.layers:
            x = layer(x, rope, level)
        states = self.norm(x)[:, first : first + depth]
        return ByDepth(self._base(states, target), states)

    def _embedded(self, tokens: Tensor, target: TargetParts) -> Tensor:
        rows = rows_of(target.embedding if self.embed_tokens is None else self.embed_tokens, tokens)
        return rows.to(self.fc.weight.dtype) * self.reading.embedding_scale

    def _base(self, states: Tensor, target: TargetParts) -> Tensor:
        logits = target.logits(states) if self.lm_head is None else self.lm_head(states)
        logits, cap = logits * self.reading.logit_scale, self.reading.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap


class DFlashDrafter(BlockDrafter):
    """Drafts with a DFlash network: all tokens of a depth have the same law, whatever is drawn above.

    Args:
        net: the network.
        tree: the tree policy, at most as deep as the block; by default a chain of as many tokens.
    """

    kind = DFlashNet
    net: DFlashNet
    method: ClassVar[str] = "dflash"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        target: PreTrainedModel,
        tree: TreePolicy | None = None,
        *,
        states: Sequence[int] | None = None,
        sample_from_anchor: bool | None = None,
        **options: Any,
    ) -> Self:
        """Read a checkpoint, plain or in the format of `speculators`; the network gets the target's dtype and device.

        Args:
            source: a folder, or a repository of the Hugging Face hub.
            target: the target.
            tree: the tree policy.
            states: which of the target's states the network reads, in place of what the file says: see `Drafter.states`.
            sample_from_anchor: whether the root's slot drafts, in place of what the file says.
            options: of the drafter.

        Raises:
            ValueError: files are missing, broken or of another kind, or the draft was made for another target.
        """
        check_kind("target", target, PreTrainedModel, "pass the model that it drafts for")
        config, tensors = read_checkpoint(source)
        with naming(source):
            file = block_file(config, tensors, target, cls.method, states, sample_from_anchor)
            net = cls._net_for(file)
        return cls(filled(net, file.tensors, file.target_ids, target, source), tree, **options)

    @staticmethod
    def _net_for(file: BlockFile) -> DFlashNet:
        return DFlashNet(**file.arguments)

    def save_pretrained(self, folder: str | Path, format: str = "plain", *, target: PreTrainedModel) -> None:
        """Write `config.json` and `model.safetensors`, which `from_pretrained` and engines read.

        Args:
            folder: made if it is not there.
            format: "plain", the layout of z-lab and DeepSpec, which vLLM and SGLang read; or "speculators", which vLLM and that
                library read.
            target: the target that it drafts for.

        Raises:
            ValueError: the format cannot say what this network does; with the reason.
        """
        write_block_file(folder, self.net, target, self.method, format, self._head_keys())

    def _head_keys(self) -> dict[str, Any]:
        return {}
