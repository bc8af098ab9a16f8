"""Medusa: extra heads on the target's last hidden state draft several tokens at once (Cai et al., arXiv:2401.10774)."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.checks import as_int, check_kind
from specdec.drafters.base import Context
from specdec.drafters.tree_drafter import TreeDrafter
from specdec.models.target import ModelTarget, Target
from specdec.sampling import Sampling
from specdec.tree import TreeSpec
from specdec.trees.base import Frontier, TreePolicy
from specdec.trees.widths import Widths

_CONFIG, _WEIGHTS = "config.json", ("medusa_lm_head.safetensors", "medusa_lm_head.pt")


class MedusaHeads(nn.Module):
    """Heads of residual blocks, x + silu(W x + b), each with an LM head of its own or all with the target's.

    Head i sees the target's state before the root and predicts the token i + 1 places after the root.

    Args:
        heads: how many.
        blocks: residual blocks of each.
        hidden: size of the target's hidden state.
        vocab: size of its vocabulary; None to share the target's LM head.
    """

    def __init__(self, heads: int, blocks: int, hidden: int, vocab: int | None = None):
        super().__init__()
        heads, blocks, hidden = as_int("heads", heads, 1), as_int("blocks", blocks, 1), as_int("hidden", hidden, 1)
        vocab = None if vocab is None else as_int("vocab", vocab, 1, cure="use None to share the target's LM head")
        self.weight = nn.Parameter(
            torch.zeros(blocks, heads, hidden, hidden)
        )  # zeros: each begins as the LM head alone
        self.bias = nn.Parameter(torch.zeros(blocks, heads, hidden))
        self.lm_head = None if vocab is None else nn.Parameter(torch.zeros(heads, vocab, hidden))

    def __len__(self) -> int:
        return self.weight.shape[1]

    def forward(self, hidden: Tensor, lm_head: nn.Module, count: int | None = None) -> Tensor:
        """[batch, head, vocab] logits of the first `count` heads, all by default, for hidden [batch, hidden].

        `lm_head` is the target's, used if shared.
        """
        count = len(self) if count is None else count
        x = hidden.to(self.weight.dtype)[None].expand(count, -1, -1)  # [head, batch, hidden]
        for weight, bias in zip(self.weight[:, :count], self.bias[:, :count], strict=True):
            x = x + nn.functional.silu(torch.baddbmm(bias[:, None], x, weight.mT))
        if self.lm_head is not None:
            return torch.bmm(x, self.lm_head[:count].mT).transpose(0, 1)
        return lm_head(x.transpose(0, 1).to(hidden.dtype)).to(hidden.device)  # it may be on another (`device_map`)

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
    """Drafts with heads on the target's hidden state: no forward pass of its own; laws depend on the depth alone.

    Lossless at any temperature with a lossless rule; `TypicalAcceptance` is what the paper used, and is not.

    Args:
        heads: trained for this target, or the folder they are in.
        tree: the tree policy, no deeper than there are heads.
    """

    uses_hidden = capturable_scores = True

    def __init__(self, heads: MedusaHeads | str | Path, tree: TreePolicy | None = None):
        check_kind("heads", heads, (MedusaHeads, str, Path), "pass MedusaHeads, or the folder they are in")
        self.heads = heads if isinstance(heads, MedusaHeads) else MedusaHeads.load(heads)
        super().__init__(Widths([1] * len(self.heads)) if tree is None else tree)
        # [batch, head, vocab], of the last root; in one place as long as that is possible, as captured graphs write to it
        self._logits = torch.empty(0)

    def __repr__(self) -> str:
        return f"MedusaDrafter({len(self.heads)} heads, {self.tree})"

    def spec(self, sampling: Sampling) -> TreeSpec:
        spec = super().spec(sampling)
        if spec.depth > len(self.heads):
            raise ValueError(
                f"{self.tree} is {spec.depth} deep, but there are {len(self.heads)} heads; use at most those."
            )
        return spec

    def start(self, target: Target, context: Context) -> None:
        if not isinstance(target, ModelTarget):
            raise ValueError(
                f"The target is a {type(target).__name__}; Medusa heads need a transformers model's states."
            )
        self._lm_head = target.cached.model.get_output_embeddings()
        size, expected = self.heads.weight.shape[-1], target.cached.model.config.get_text_config().hidden_size
        if size != expected:
            raise ValueError(f"The heads read states of size {size}, the target's are of size {expected}: other heads.")
        own = target.vocab if self.heads.lm_head is None else self.heads.lm_head.shape[1]
        if own != target.vocab:
            raise ValueError(f"The heads draft {own} tokens, the target's vocabulary has {target.vocab}: other heads.")
        self.heads.to(target.device)

    def prepare(self, frontier: Frontier, context: Context) -> Hashable:
        if frontier.topology.depth == 0:
            self._deepest = min(self.tree.spec(context.sampling).depth, context.max_depth)
        return self._deepest

    def score(self, frontier: Frontier, context: Context) -> Tensor:
        depth, count = frontier.topology.depth, frontier.tokens.shape[1]
        if depth == 0:  # all heads at once, as deep as this tree may become
            assert context.hidden is not None
            logits = self.heads(context.hidden, self._lm_head, self._deepest)
            shape = (len(logits), len(self.heads), logits.shape[2])
            if (self._logits.shape, self._logits.dtype, self._logits.device) != (shape, logits.dtype, logits.device):
                self._logits = logits.new_empty(shape)
            self._logits[:, : self._deepest] = logits
        return self._logits[:, depth : depth + 1].expand(-1, count, -1)


def _read(folder: Path) -> dict[str, Tensor]:
    """The tensors by name, without the prefix that some checkpoints have."""
    path = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise FileNotFoundError(f"There is no {' or '.join(_WEIGHTS)} in {folder}.")
    tensors = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, map_location="cpu")
    )
    return {name.removeprefix("medusa_head."): tensor for name, tensor in tensors.items()}
