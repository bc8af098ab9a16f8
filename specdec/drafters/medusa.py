"""Medusa: extra heads on the target's last hidden state draft several tokens at once (Cai et al., arXiv:2401.10774)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.checks import as_int, check_kind
from specdec.drafters.block import BlockDrafter, BlockNet, ByDepth
from specdec.drafters.checkpoints import read_tensors
from specdec.drafters.states_net import TargetParts
from specdec.models.level import Level
from specdec.trees.base import TreePolicy

_CONFIG, _WEIGHTS = "config.json", ("medusa_lm_head.safetensors", "medusa_lm_head.pt")


class MedusaHeads(BlockNet):
    """Heads of residual blocks, x + silu(W x + b), each with an LM head of its own or all with the target's.

    Head i sees the target's state before the root and predicts the token i + 1 places after the root.

    Args:
        heads: how many heads.
        blocks: residual blocks of each head.
        hidden: size of the target's hidden state.
        vocab: size of its vocabulary; None to share the target's LM head.
    """

    def __init__(self, heads: int, blocks: int, hidden: int, vocab: int | None = None):
        super().__init__()
        heads, blocks, hidden = as_int("heads", heads, 1), as_int("blocks", blocks, 1), as_int("hidden", hidden, 1)
        vocab = None if vocab is None else as_int("vocab", vocab, 1, cure="use None to share the target's LM head")
        # With zeros, each head begins as the LM head alone.
        self.weight = nn.Parameter(torch.zeros(blocks, heads, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(blocks, heads, hidden))
        self.lm_head = None if vocab is None else nn.Parameter(torch.zeros(heads, vocab, hidden))
        self.states, self.state_size, self.kept = (-1,), hidden, hidden
        self.vocab, self.depth = vocab, heads

    def follow(self, tokens: Tensor, states: Tensor, level: Level, target: TargetParts) -> Tensor:
        return states[:, :, 0]

    def block(self, root: Tensor, last: Tensor, level: Level, depth: int, target: TargetParts) -> ByDepth:
        x = last.to(self.weight.dtype)[None].expand(depth, -1, -1)  # [head, batch, hidden]
        for weight, bias in zip(self.weight[:, :depth], self.bias[:, :depth], strict=True):
            x = x + nn.functional.silu(torch.baddbmm(bias[:, None], x, weight.mT))
        if self.lm_head is None:
            return ByDepth(target.logits(x.transpose(0, 1)))
        return ByDepth(torch.bmm(x, self.lm_head[:depth].mT).transpose(0, 1))

    @classmethod
    def load(cls, folder: str | Path) -> MedusaHeads:
        """Heads in the layout of published checkpoints: `config.json` beside `medusa_lm_head.safetensors` or `.pt`.

        Heads without an LM head of their own share the target's.
        """
        folder = Path(folder)
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
        return cls._from(_read(folder), config["medusa_num_heads"], config["medusa_num_layers"])

    @classmethod
    def _from(cls, tensors: Mapping[str, Tensor], heads: int, blocks: int) -> MedusaHeads:
        def stack(name: str) -> Tensor:
            return torch.stack([tensors[name.format(i=i)] for i in range(heads)])

        try:
            weight = torch.stack([stack(f"{{i}}.{j}.linear.weight") for j in range(blocks)])
            bias = torch.stack([stack(f"{{i}}.{j}.linear.bias") for j in range(blocks)])
            own = stack(f"{{i}}.{blocks}.weight") if f"0.{blocks}.weight" in tensors else None
        except KeyError as missing:
            raise ValueError(
                f"No tensor {missing} for {heads} heads of {blocks} blocks; there are {', '.join(sorted(tensors)[:8])}, ..."
            ) from None
        made = cls(heads, blocks, weight.shape[-1], None if own is None else own.shape[1]).to(weight.dtype)
        made.load_state_dict({"weight": weight, "bias": bias, **({} if own is None else {"lm_head": own})})
        return made.eval()


class MedusaDrafter(BlockDrafter):
    """Drafts with heads on the target's hidden state, without a forward pass. Draft laws depend on the depth alone.

    Deviation: the paper uses `TypicalAcceptance`, which is not lossless. With a lossless rule the text has the target's law at
    any temperature.

    Args:
        heads: trained for this target.
        tree: the tree policy, at most as deep as there are heads; by default a chain of as many.
    """

    kind = MedusaHeads
    net: MedusaHeads

    def __init__(self, heads: MedusaHeads, tree: TreePolicy | None = None):
        super().__init__(heads, tree)

    @classmethod
    def from_pretrained(cls, source: str | Path, target: PreTrainedModel, tree: TreePolicy | None = None) -> Self:
        """Heads as their authors write them, in the target's dtype and on its device.

        Args:
            source: the folder that they are in.
            target: the model that they were made for.
            tree: the tree policy.
        """
        check_kind("target", target, PreTrainedModel, "pass the model that it drafts for")
        return cls(MedusaHeads.load(source).to(target.device, target.dtype), tree)

    def __repr__(self) -> str:
        return f"MedusaDrafter({self.net.depth} heads, {self.tree})"

    def save_pretrained(self, folder: str | Path, *, target: PreTrainedModel | None = None) -> None:
        """Write the published layout: `config.json` and `medusa_lm_head.safetensors`. The target is not asked for anything."""
        folder, net, tensors = Path(folder), self.net, {}
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(net.depth):
            for j, (weight, bias) in enumerate(zip(net.weight, net.bias, strict=True)):
                tensors[f"{i}.{j}.linear.weight"] = weight[i].detach().contiguous()
                tensors[f"{i}.{j}.linear.bias"] = bias[i].detach().contiguous()
            if net.lm_head is not None:
                tensors[f"{i}.{len(net.weight)}.weight"] = net.lm_head[i].detach().contiguous()
        save_file(tensors, folder / _WEIGHTS[0])
        config = {"medusa_num_heads": net.depth, "medusa_num_layers": len(net.weight)}
        (folder / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def _read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the prefix that some checkpoints have."""
    path = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise FileNotFoundError(f"There is no {' or '.join(_WEIGHTS)} in {folder}.")
    return {name.removeprefix("medusa_head."): tensor for name, tensor in read_tensors(path).items()}
