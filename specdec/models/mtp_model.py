"""The network for multi-token prediction (MTP) in a model's own repository, which loading the model leaves out."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import transformers
from torch import Tensor
from transformers import Cache, PreTrainedModel, modeling_layers

from specdec.models.level import Level
from specdec.models.ready import device_of

_SHOWN = 4  # names of tensors in a message


class LevelCache(Cache):
    """A `Level`, as transformers' layers take their cache."""

    def __init__(self, level: Level):
        super().__init__(layers=[])
        self.level = level

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self.level.add(layer_idx, key_states, value_states)


class MtpModel(modeling_layers.MtpModel):
    """transformers' network, run over a `LevelCache`. It knows the namings of checkpoints by the name of this class."""

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers would not look them up

    def create_masks_for_mtp_layer(self, layer_idx: int, inputs_embeds: Tensor, mtp_cache: Any, *_: Any) -> Any:
        kinds = getattr(self.config, "layer_types", None) or {layer_idx: "full_attention"}
        windows = {"full_attention": None, "sliding_attention": getattr(self.config, "sliding_window", None)}
        if kinds[layer_idx] not in windows:
            raise ValueError(
                f"The MTP layer of {self.config.name_or_path} has {kinds[layer_idx]}; full and sliding attention can follow a "
                "tree. Use another drafter."
            )
        return {"attention_mask": mtp_cache.level.mask(inputs_embeds.dtype, windows[kinds[layer_idx]])}

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Called when weights have been loaded; raises ValueError unless they fit, where transformers would log that."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        where, missing = self.config.name_or_path, sorted(loading_info.missing_keys)
        if {name for name in self.state_dict() if name.startswith("layers.")} <= {*missing}:
            raise ValueError(
                f"{where} holds no MTP weights, neither as layers after the model's last nor as mtp.*; use another drafter."
            )
        shapes = [f"{name} {[*found]} for {[*due]}" for name, found, due in sorted(loading_info.mismatched_keys)]
        faults = {"missing": missing, "unexpected": sorted(loading_info.unexpected_keys), "of another shape": shapes}
        said = [f"{kind}: {_shortened(names)}" for kind, names in faults.items() if names]
        said += [_shortened(sorted(loading_info.conversion_errors.values()))] if loading_info.conversion_errors else []
        if said:
            raise ValueError(
                f"The MTP weights of {where} are not those of a layer like the model's last; by the names of transformers' "
                f"MtpModel, {'; '.join(said)}. Use another drafter."
            )


def mtp_model_of(model: PreTrainedModel) -> MtpModel:
    """The MTP network in the repository that a model was loaded from, in eval mode, in the model's dtype and on its device.

    Its weights are in layers after the model's last (DeepSeek-V3, GLM-4.5 and their kin) or named mtp.* (Qwen3-Next, Mellum).
    Its layers are of the kind of the model's last one, unless the config says otherwise.

    Raises:
        ValueError: there are no such weights, or they do not fit, or this transformers cannot run the network.
    """
    if not hasattr(MtpModel, "forward_layer"):
        raise ValueError(
            f"transformers {transformers.__version__} has no MtpModel.forward_layer; install transformers>=5.20."
        )
    if not model.config.name_or_path:
        raise ValueError(
            f"This {type(model).__name__} was not loaded from a repository, where its MTP weights would be; load it by "
            "from_pretrained(name)."
        )
    made: Any = MtpModel.from_pretrained(_described(model), device_map={"": device_of(model)})
    return made.eval()


def _described(model: PreTrainedModel) -> PreTrainedModel:
    """The model under a config that tells of MTP layers, and with the names by which transformers finds their weights."""
    described, config = copy(model), deepcopy(model.config)
    text: Any = config.get_text_config(decoder=True)
    text.num_mtp_layers = count = getattr(text, "num_mtp_layers", None) or 1
    for kinds in ("layer_types", "mlp_layer_types"):
        if getattr(text, kinds, None) and not getattr(text, f"mtp_{kinds}", None):
            setattr(text, f"mtp_{kinds}", getattr(text, kinds)[-1:] * count)
    after = range(text.num_hidden_layers, text.num_hidden_layers + count)
    patterns = [r"^(model\.)?mtp\.", *(rf"^model\.layers\.{layer}\." for layer in after)]
    described.config, config.dtype, described._keys_to_ignore_on_load_unexpected = config, model.dtype, patterns
    return described


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
