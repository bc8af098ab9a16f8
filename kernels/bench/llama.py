"""A target of the exact shape of Llama 3 8B, and trees of nodes it need not like: what verification costs is the same."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.batch import Batch
from specdec.coins import Coins
from specdec.drafters.base import Drafter, DraftRun
from specdec.laws import Law
from specdec.models.target import TargetRun
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Topology, TreeSpec

SHAPE = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
WIDTH = 4  # children of a node


def llama3(device: str, dtype: torch.dtype, tiny: bool = False) -> LlamaForCausalLM:
    """Of random weights, in eval mode."""
    shape: dict[str, Any] = TINY if tiny else SHAPE
    config = LlamaConfig(**shape, max_position_embeddings=131072, rms_norm_eps=1e-5)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


class FixedTree(Drafter):
    """Drafts one shape, every node with `WIDTH` children as far as they go, of tokens that follow from the root's."""

    capturable = True

    def __init__(self, nodes: int):
        self.parents = [-1, *((node - 1) // WIDTH for node in range(1, nodes))]
        self.depths = [0]
        for parent in self.parents[1:]:
            self.depths.append(self.depths[parent] + 1)

    def spec(self, sampling: Sampling) -> TreeSpec:
        return TreeSpec(frozenset({Law.POINT}), len(self.parents), self.depths[-1], WIDTH, by_depth=True)

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        return last if last and last.batch is batch else _FixedRun(self, batch)


class _FixedRun(DraftRun):
    def __init__(self, drafter: FixedTree, batch: Batch):
        super().__init__(drafter, batch)
        self._depths = drafter.depths
        self._parents = torch.tensor(drafter.parents, device=batch.device)
        self._places = torch.arange(len(drafter.parents), device=batch.device)

    def propose(self, coins: Coins) -> DraftTree:
        batch = self.batch
        depth = min(self._depths[-1], batch.max_depth)
        nodes = sum(own <= depth for own in self._depths)  # the deepest come last
        parents = self._parents[:nodes].expand(len(batch), -1)
        tokens = (batch.root[:, None] + self._places[:nodes]) % batch.vocab
        return DraftTree(
            tokens, Topology(parents, depth, WIDTH), torch.full_like(tokens, int(Law.POINT), dtype=torch.uint8)
        )
