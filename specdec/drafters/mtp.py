"""MTP: the layer for the token after next that many targets bring along (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import check_kind
from specdec.drafters.feature import FeatureDrafter, FeatureNet
from specdec.drafters.states_net import TargetParts
from specdec.models.attention import NAME
from specdec.models.level import Level
from specdec.models.mtp_model import LevelCache, MtpModel, mtp_model_of
from specdec.models.routing import Route
from specdec.trees.base import TreePolicy


class MtpNet(FeatureNet):
    """The first MTP layer of a target. It reads the target's last state, normed, and later its own output, normed as well.

    Args:
        mtp: transformers' network. Its further layers, and its links to the target's embedding and LM head, are cut off.
    """

    states = (-1,)

    def __init__(self, mtp: MtpModel):
        super().__init__()
        del mtp.embed_tokens, mtp.shared_head
        mtp.layers = mtp.layers[:1]
        mtp.rotary_emb = deepcopy(mtp.rotary_emb)  # the target's own may change with the length of its text
        self.mtp, self.route = mtp, Route(mtp, NAME)
        self.state_size = self.kept = mtp.config.hidden_size
        self.attention, self.values = ([shape] for shape in self._shapes())

    def project(self, states: Tensor) -> Tensor:
        return states[:, :, 0]

    def step(self, tokens: Tensor, features: Tensor, level: Level, target: TargetParts) -> Tensor:
        return self._layer(target.embed(tokens), features, level)

    def logits(self, outputs: Tensor, target: TargetParts) -> Tensor:
        return target.logits(outputs)

    def _layer(self, embeddings: Tensor, features: Tensor, level: Level) -> Tensor:
        cache: Any = LevelCache(level)
        with self.route:
            return self.mtp.forward_layer(0, features, level.positions, cache, inputs_embeds=embeddings)

    @torch.no_grad()
    def _shapes(self) -> list[tuple[int, int]]:
        """(heads, size of a head) of the layer's keys, and of its values: those of latent attention differ."""
        zeros = next(self.parameters()).new_zeros(1, 1, self.kept)
        level = _Noting(zeros.new_zeros(1, 1, dtype=torch.int64))
        self._layer(zeros, zeros, level)
        return level.shapes


class _Noting(Level):
    """One node, which sees itself. Notes the shapes of keys and values."""

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.shapes = [(states.shape[1], states.shape[3]) for states in (key, value)]
        return key, value

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        return torch.zeros(1, 1, 1, 1, dtype=dtype, device=self.positions.device)


class MtpDrafter(FeatureDrafter):
    """Drafts with the MTP layer that the target's own repository holds, along any tree.

    If the repository holds several, for one depth each, only the first is used: at every depth.
    """

    kind = MtpNet
    net: MtpNet

    @classmethod
    def from_target(cls, target: PreTrainedModel, tree: TreePolicy | None = None) -> MtpDrafter:
        """The drafter in the folder, or the repository on the hub, that a target was loaded from.

        Weights are read from layers after the target's last (DeepSeek-V3, GLM-4.5 and their kin) and by the names mtp.*
        (Qwen3-Next, Mellum).

        Args:
            target: a model made by `from_pretrained`.
            tree: the tree policy; a chain of 4 by default.

        Raises:
            ValueError: there are no MTP weights, or they do not fit, or the installed transformers cannot run them.
        """
        cure = "pass the target, as from AutoModelForCausalLM.from_pretrained(name)"
        check_kind("target", target, PreTrainedModel, cure)
        return cls(MtpNet(mtp_model_of(target)), tree)
