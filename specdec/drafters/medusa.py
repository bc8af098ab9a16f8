"""Medusa: extra heads on the target's last hidden state draft several tokens at once (Cai et al., arXiv:2401.10774)."""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.batch import Batch
from specdec.checks import as_int, check_kind
from specdec.drafters.base import DraftRun
from specdec.drafters.tree_drafter import TreeDrafter, TreeDraftRun
from specdec.models.target import ModelTargetRun, TargetRun
from specdec.sampling import Sampling
from specdec.tree import TreeSpec
from specdec.trees.base import Frontier, TreePolicy
from specdec.trees.widths import Widths

_CONFIG, _WEIGHTS = "config.json", ("medusa_lm_head.safetensors", "medusa_lm_head.pt")


class MedusaHeads(nn.Module):
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

    def __len__(self) -> int:
        return self.weight.shape[1]

    def forward(self, hidden: Tensor, lm_head: nn.Module, count: int | None = None) -> Tensor:
        """[batch, head, vocab]: logits of the first `count` heads, all by default, for states `hidden` [batch, hidden].

        `lm_head` is the target's; it is used if the heads have none of their own.
        """
        count = len(self) if count is None else count
        x = hidden.to(self.weight.dtype)[None].expand(count, -1, -1)  # [head, batch, hidden]
        for weight, bias in zip(self.weight[:, :count], self.bias[:, :count], strict=True):
            x = x + nn.functional.silu(torch.baddbmm(bias[:, None], x, weight.mT))
        if self.lm_head is not None:
            return torch.bmm(x, self.lm_head[:count].mT).transpose(0, 1)
        return lm_head(x.transpose(0, 1).to(hidden.dtype)).to(hidden.device)  # `device_map` may put it elsewhere

    def save(self, folder: str | Path) -> None:
        """Write the published layout: `config.json` and `medusa_lm_head.safetensors`."""
        folder, blocks = Path(folder), len(self.weight)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for i in range(len(self)):
            for j in range(blocks):
                tensors[f"{i}.{j}.linear.weight"] = self.weight[j, i].detach().contiguous()
                tensors[f"{i}.{j}.linear.bias"] = self.bias[j, i].detach().contiguous()
            if self.lm_head is not None:
                tensors[f"{i}.{blocks}.weight"] = self.lm_head[i].detach().contiguous()
        save_file(tensors, folder / _WEIGHTS[0])
        config = {"medusa_num_heads": len(self), "medusa_num_layers": blocks}
        (folder / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")

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


class MedusaDrafter(TreeDrafter):
    """Drafts with heads on the target's hidden state, without a forward pass. Draft laws depend on the depth alone.

    Deviation: the paper uses `TypicalAcceptance`, which is not lossless. With a lossless rule the text has the target's law at
    any temperature.

    Args:
        heads: heads trained for this target, or the folder that they are in.
        tree: the tree policy, at most as deep as there are heads.
    """

    states = (-1,)
    capturable_scores = True

    def __init__(self, heads: MedusaHeads | str | Path, tree: TreePolicy | None = None):
        check_kind("heads", heads, (MedusaHeads, str, Path), "pass MedusaHeads, or the folder they are in")
        self.heads = heads if isinstance(heads, MedusaHeads) else MedusaHeads.load(heads)
        self.models = (self.heads,)
        super().__init__(Widths([1] * len(self.heads)) if tree is None else tree)

    def __repr__(self) -> str:
        return f"MedusaDrafter({len(self.heads)} heads, {self.tree})"

    def spec(self, sampling: Sampling) -> TreeSpec:
        spec = super().spec(sampling)
        if spec.depth > len(self.heads):
            raise ValueError(
                f"{self.tree} is {spec.depth} deep, but there are {len(self.heads)} heads; use a tree no deeper than that."
            )
        return spec

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        if not isinstance(target, ModelTargetRun):
            raise ValueError(
                f"The target is a {type(target.target).__name__}; Medusa heads need a transformers model's states."
            )
        model = target.cached.lm.model
        size, expected = self.heads.weight.shape[-1], model.config.get_text_config().hidden_size
        if size != expected:
            raise ValueError(f"The heads read states of size {size}, the target's have {expected}; use other heads.")
        own = batch.vocab if self.heads.lm_head is None else self.heads.lm_head.shape[1]
        if own != batch.vocab:
            raise ValueError(f"The heads know {own} tokens, the target knows {batch.vocab}; use other heads.")
        head: Any = model.get_output_embeddings()
        return MedusaRun(self, batch, head, last).begun(last)


class MedusaRun(TreeDraftRun):
    """Heads at work. They read one state of the target, that before the root."""

    drafter: MedusaDrafter

    def __init__(self, drafter: MedusaDrafter, batch: Batch, lm_head: nn.Linear, last: DraftRun | None):
        super().__init__(drafter, batch, last, lm_head)
        self._lm_head, heads = lm_head, drafter.heads
        here = heads.weight.device == batch.device
        self._heads = heads if here else copy.deepcopy(heads).to(batch.device)  # the drafter's heads are not moved
        # [batch, hidden]: the state before the root; zeros if the root is the text's first token. Captured graphs write this
        # tensor and the logits in place.
        self._state = torch.zeros(len(batch), heads.weight.shape[-1], dtype=lm_head.weight.dtype, device=batch.device)
        self._logits: Tensor | None = None  # [batch, head, vocab], after the root

    def begun(self, last: DraftRun | None) -> DraftRun:
        run = super().begun(last)
        if isinstance(run, MedusaRun) and run._heads is not run.drafter.heads:
            # a copy on the target's device; the heads may have been trained since
            run._heads.load_state_dict(run.drafter.heads.state_dict())
        return run

    def enter(self, rows: list[int]) -> None:
        for row in rows:
            if self.batch.host_lengths[row] == 1:
                self._state[row] = 0

    def states_known(self) -> list[int]:
        return list(self.batch.host_lengths)  # only the last state is needed, which is passed in any case

    def read(self, states: Tensor, start: Tensor, count: Tensor) -> None:
        last = (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, states.shape[3])
        found = states[:, :, 0].gather(1, last)[:, 0]
        self._state = _filled(self._state, torch.where(count[:, None] > 0, found, self._state.to(found.dtype)))

    def prepare(self, frontier: Frontier) -> Hashable:
        if frontier.topology.depth == 0:
            self._deepest = min(self.tree.policy.spec(self.batch.sampling).depth, self.batch.max_depth)
        return self._deepest

    def score(self, frontier: Frontier) -> Tensor:
        depth, count = frontier.topology.depth, frontier.tokens.shape[1]
        if depth == 0:  # run all heads that this tree may need at once
            logits = self._heads(self._state, self._lm_head, self._deepest)
            missing = len(self._heads) - self._deepest
            self._logits = _filled(self._logits, nn.functional.pad(logits, (0, 0, 0, missing)))
        assert self._logits is not None
        return self._logits[:, depth : depth + 1].expand(-1, count, -1)


def _filled(kept: Tensor | None, new: Tensor) -> Tensor:
    """`new`, written into the memory of `kept` if shape, dtype and device agree."""
    if kept is None or (kept.shape, kept.dtype, kept.device) != (new.shape, new.dtype, new.device):
        return new.clone()
    return kept.copy_(new)


def _read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the prefix that some checkpoints have."""
    path = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise FileNotFoundError(f"There is no {' or '.join(_WEIGHTS)} in {folder}.")
    tensors = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, map_location="cpu")
    )
    return {name.removeprefix("medusa_head."): tensor for name, tensor in tensors.items()}
