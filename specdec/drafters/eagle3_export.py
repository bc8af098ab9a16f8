"""EAGLE-3 drafts as files that engines serve: config fields and tensor names as vLLM, SGLang and TensorRT-LLM read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import check_kind
from specdec.drafters.checkpoints import speculators_keys
from specdec.drafters.eagle3_files import IDS, default_states
from specdec.drafters.shapes import marked

if TYPE_CHECKING:
    from specdec.drafters.eagle3 import Eagle3Net

FORMATS = ("eagle3", "speculators")
_LAYER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers",
          "rms_norm_eps", "hidden_act", "attention_bias", "vocab_size", "max_position_embeddings", "rope_parameters",
          "bos_token_id", "eos_token_id", "sliding_window", "layer_types")  # fmt: skip


def exported(
    net: Eagle3Net, format: str, target: PreTrainedModel | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and tensors of a network, as engines read them.

    Args:
        net: the network.
        format: "eagle3" for vLLM, SGLang and TensorRT-LLM; "speculators" for vLLM, and for further training.
        target: the model that it drafts for; "speculators" names it.

    Raises:
        ValueError: the format cannot say what this network does; with the reason.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: must be {' or '.join(map(repr, FORMATS))}.")
    check_kind("target", target, (PreTrainedModel, type(None)), "pass the model that it drafts for")
    _check_vocab(net, target)
    for wrong, reason in _unsaid(net, format):
        if wrong:
            raise ValueError(f"format={format!r}: {reason}.")
    if format == "eagle3":
        return _plain(net, target), _tensors(net, format)
    if target is None:
        raise ValueError("format='speculators': its files name the model that is drafted for; pass target=.")
    return _speculators(net, target), _head(net, target) | _tensors(net, format)


def _unsaid(net: Eagle3Net, format: str) -> list[tuple[bool, str]]:
    """(whether it is so, why the format cannot say it)."""
    cure, windows = 'use format="speculators", for vLLM', any(layer.window for layer in net.layers)
    always = [
        (-1 in net.states, f"states {net.states} hold -1, which is before no layer; engines hand over states of layers")
    ]
    if format == "speculators":
        return [
            *always,
            (net.state_size != net.kept, f"its fc is for states of the draft's size {net.kept}, not {net.state_size}"),
        ]
    return [
        *always,
        (0 in net.states, "state 0 is after no layer, and SGLang counts states after layers"),
        (net.reading.norm_before_residual, f"SGLang does not know norm_before_residual and would draft worse; {cure}"),
        (len(net.layers) > 1, f"SGLang and TensorRT-LLM read one layer, not {len(net.layers)}; {cure}"),
        (net.head_norms, f"SGLang knows no norms of queries and keys in this layer; {cure}"),
        (windows, f"SGLang knows no sliding windows in this layer; {cure}"),
    ]


def _check_vocab(net: Eagle3Net, target: PreTrainedModel | None) -> None:
    """Raise ValueError unless `config.vocab_size` is the target's, which files name."""
    said, known = net.config.vocab_size, set()
    if target is not None:
        known.add(target.config.get_text_config().vocab_size)
    if net.embed_tokens is not None:
        known.add(net.embed_tokens.num_embeddings)
    if net.target_ids is None and net.vocab is not None:
        known.add(net.vocab)
    if known - {said} or (net.target_ids is not None and int(net.target_ids.max()) >= said):
        raise ValueError(
            f"config.vocab_size={said}: must be how many tokens the target knows, as {known or 'target_ids'} say."
        )


def _tensors(net: Eagle3Net, format: str) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in net.state_dict().items() if name != "target_ids"}
    if format == "eagle3":
        tensors = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in tensors.items()}
    return tensors | marked(net.target_ids, net.config.vocab_size)


def _head(net: Eagle3Net, target: PreTrainedModel) -> dict[str, Tensor]:
    """The target's LM head, if the network uses it: these files hold one in any case."""
    head: Any = target.get_output_embeddings()
    if net.lm_head is not None:
        return {}
    if getattr(head, "bias", None) is not None:
        raise ValueError("format='speculators': its LM head has no bias, as the target's has; use format='eagle3'.")
    return {"lm_head.weight": head.weight}


def _layer(net: Eagle3Net) -> dict[str, Any]:
    found = {key: getattr(net.config, key, None) for key in _LAYER}
    if not any(layer.window for layer in net.layers):
        found |= {"sliding_window": None, "layer_types": None}
    return {key: value for key, value in found.items() if value is not None}


def _reading(net: Eagle3Net) -> dict[str, Any]:
    return {
        "draft_vocab_size": net.vocab or net.config.vocab_size,
        "norm_before_residual": net.reading.norm_before_residual,
        "norm_output": net.reading.norm_output,
        "norm_before_fc": net.norms == "input_norm",
        "fc_norm": net.norms == "fc_norm",
    }


def _dtype(net: Eagle3Net) -> str:
    return str(net.fc.weight.dtype).removeprefix("torch.")


def _plain(net: Eagle3Net, target: PreTrainedModel | None) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "torch_dtype": _dtype(net),
        "tie_word_embeddings": False,
        **_layer(net),
        "rope_theta": net.config.rope_parameters["rope_theta"],
        **_reading(net),
    }
    if net.state_size != net.kept:
        config["target_hidden_size"] = net.state_size
    if target is not None and net.states == default_states(target.config.get_text_config().num_hidden_layers):
        return config  # all engines take these states where a file names none, and not all count alike where it does
    after = {"use_aux_hidden_state": True, IDS: [i - 1 for i in net.states]}
    return {**config, IDS: list(net.states), "eagle_config": after}


def _speculators(net: Eagle3Net, target: PreTrainedModel) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3Speculator"],
        "dtype": _dtype(net),
        **speculators_keys("eagle3", 3, target),
        "transformer_layer_config": {"model_type": "qwen3" if net.head_norms else "llama", **_layer(net)},
        **_reading(net),
        "embed_requires_grad": net.embed_tokens is not None,
        "target_hidden_size": None,
        IDS: list(net.states),
    }
