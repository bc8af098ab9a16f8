"""MTP: the layer for the token after next that many targets bring along (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, modeling_layers

from specdec.checks import check_kind
from specdec.drafters.feature import FeatureDrafter, FeatureNet
from specdec.drafters.states_drafter import TargetParts
from specdec.models.attention import NAME, View
from specdec.models.cache import RecordingCache
from specdec.models.level import CachedLevel, Level
from specdec.models.probe import device_of
from specdec.models.routing import Route
from specdec.tree import chain
from specdec.trees.base import TreePolicy

_SHOWN = 4  # names of tensors in a message


class MtpModel(modeling_layers.MtpModel):
    """transformers' network, which refuses weights that do not fit. By this class's name transformers knows its namings."""

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers would leave the namings out

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        missing, where = sorted(loading_info.missing_keys), self.config.name_or_path
        if len(missing) == sum(not name.startswith(("embed_tokens", "shared_head")) for name in self.state_dict()):
            raise ValueError(
                f"{where} holds no MTP weights, neither in layers behind the target's last nor as mtp.*; use another drafter."
            )
        shapes = [
            f"{name} {[*found]}, needed {[*needed]}" for name, found, needed in sorted(loading_info.mismatched_keys)
        ]
        faults = {"missing": missing, "unexpected": sorted(loading_info.unexpected_keys), "of another shape": shapes}
        said = [f"{kind}: {_shortened(names)}" for kind, names in faults.items() if names]
        if said or loading_info.conversion_errors:
            raise ValueError(
                f"The MTP weights of {where} are not those of a layer like the target's last. By the names of transformers' "
                f"MtpModel: {'; '.join(said) or loading_info.conversion_errors}. Use another drafter."
            )


class MtpNet(FeatureNet):
    """The first MTP layer of a target, which is fed its own outputs from the second level of a tree on.

    Args:
        mtp: transformers' network; it gives up its links to the target's embedding and LM head, and its further layers.
    """

    states = (-1,)

    def __init__(self, mtp: modeling_layers.MtpModel):
        super().__init__()
        del mtp.embed_tokens, mtp.shared_head
        mtp.layers = mtp.layers[:1]
        mtp.rotary_emb = deepcopy(mtp.rotary_emb)  # some change with the length of the text
        self.mtp, self.route = mtp, Route(mtp, NAME)
        self.state_size = self.kept = mtp.config.hidden_size
        slabs = self._probe()
        self.attention, self.values = ([(slab.heads, slab.dim)] for slab in slabs)

    def project(self, states: Tensor) -> Tensor:
        return states[:, :, 0]

    def step(self, tokens: Tensor, features: Tensor, level: Level, target: TargetParts) -> Tensor:
        assert isinstance(level, CachedLevel)  # transformers' layers write to a cache
        return self._layer(target.embed(tokens).to(features), features, level.positions, level.cache)

    def logits(self, outputs: Tensor, target: TargetParts) -> Tensor:
        return target.logits(outputs)

    def _layer(self, embeddings: Tensor, features: Tensor, positions: Tensor, cache: Any) -> Tensor:
        with self.route:
            return self.mtp.forward_layer(0, features, positions, cache, inputs_embeds=embeddings)

    @torch.inference_mode()
    def _probe(self) -> Any:
        """The shapes of the layer's keys and values."""
        weight = self.mtp.layers[0].eh_proj.weight
        zeros = weight.new_zeros(1, 1, self.kept)
        view = View(zeros.new_zeros(1, dtype=torch.int64), chain(1, 1, weight.device), count=1, slots=1)
        cache = RecordingCache(1, view)
        try:
            self._layer(zeros, zeros, view.positions, cache)
        except ValueError as error:  # sparse attention has an index of its own
            raise ValueError(
                f"This MTP layer keeps more than keys and values ({error}); use another drafter."
            ) from error
        return cache.records[0].slabs


class MtpDrafter(FeatureDrafter):
    """Drafts with the MTP layer that the target's own repository holds, along any tree.

    The layer reads the target's last state, normed, and the next token; from the second level of a tree on it reads its own
    output in place of the state. Of several MTP layers only the first is used, at every depth.
    """

    net: MtpNet

    @classmethod
    def from_target(cls, target: PreTrainedModel, tree: TreePolicy | None = None) -> MtpDrafter:
        """The drafter in a target's repository: the folder or the name on the hub that the target was loaded from.

        Read are weights in layers behind the target's last (DeepSeek-V3, GLM-4.5 and their kin) and those named mtp.* (Qwen3-Next,
        Mellum). The layer is of the class of the target's last one, in the target's dtype and on its device.

        Args:
            target: a model made by `from_pretrained`.
            tree: the tree policy; a chain of 4 by default.

        Raises:
            ValueError: there are no MTP weights, or they do not fit, or this transformers cannot run them.
        """
        check_kind(
            "target", target, PreTrainedModel, "pass the target, as from AutoModelForCausalLM.from_pretrained(name)"
        )
        if not hasattr(MtpModel, "forward_layer"):
            raise ValueError(
                f"transformers {transformers.__version__} has no MtpModel.forward_layer; install transformers>=5.20."
            )
        if not target.config.name_or_path:
            raise ValueError(
                f"This {type(target).__name__} was not loaded from a repository, which would hold its MTP weights; load it by "
                "from_pretrained(name)."
            )
        mtp = MtpModel.from_pretrained(_described(target), device_map={"": device_of(target)})
        return cls(MtpNet(mtp.eval()), tree)


def _described(target: PreTrainedModel) -> PreTrainedModel:
    """The target itself, under a config that tells of MTP layers, for transformers to read these by."""
    described, config = copy(target), deepcopy(target.config)
    text: Any = config.get_text_config(decoder=True)
    text.num_mtp_layers = count = getattr(text, "num_mtp_layers", None) or 1
    if getattr(text, "layer_types", None) and not getattr(text, "mtp_layer_types", None):
        text.mtp_layer_types = ["full_attention"] * count
    if getattr(text, "mlp_layer_types", None) and not getattr(text, "mtp_mlp_layer_types", None):
        text.mtp_mlp_layer_types = text.mlp_layer_types[-1:] * count
    described.config, config.dtype = config, target.dtype
    behind = range(text.num_hidden_layers, text.num_hidden_layers + count)
    patterns = [r"^(model\.)?mtp\.", *(rf"^model\.layers\.{layer}\." for layer in behind)]
    described._keys_to_ignore_on_load_unexpected = patterns  # by these it finds the weights
    return described


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
