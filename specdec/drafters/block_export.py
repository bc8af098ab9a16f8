"""Checkpoints of DFlash and DSpark as vLLM, SGLang and `speculators` read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.checkpoints import speculators_keys, write_checkpoint
from specdec.drafters.shapes import marked

_ARCHITECTURES = {
    ("dflash", "plain"): "DFlashDraftModel",
    ("dspark", "plain"): "Qwen3DSparkModel",
    ("dflash", "speculators"): "DFlashSpeculator",
    ("dspark", "speculators"): "DSparkSpeculator",
}
_LAYER_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
               "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "rope_parameters")  # fmt: skip


def write_block_file(
    folder: str | Path, net: Any, target: PreTrainedModel, method: str, form: str, heads: dict[str, Any]
) -> None:
    """Write a folder.

    Args:
        folder: made if it is not there.
        net: a `DFlashNet`.
        target: the target that it drafts for.
        method: "dflash" or "dspark".
        form: "plain" or "speculators".
        heads: the keys of the heads that the method adds.
    """
    if form not in ("plain", "speculators"):
        raise ValueError(f"format={form!r}: must be 'plain' or 'speculators'.")
    text = target.config.get_text_config()
    top = {
        "architectures": [_ARCHITECTURES[method, form]],
        "dtype": str(net.fc.weight.dtype).removeprefix("torch."),
        "block_size": net.slots,
        "sample_from_anchor": net.reading.from_anchor,
        "draft_vocab_size": text.vocab_size if net.vocab is None else net.vocab,
        **heads,
    }
    layers, write = _layers(net, text), {"plain": _plain, "speculators": _speculators}[form]
    write_checkpoint(folder, top | write(net, target, layers, method), _tensors(net, text.vocab_size))


def _layers(net: Any, target: Any) -> dict[str, Any]:
    """The config of the layers."""
    kinds = ["full_attention" if layer.window is None else "sliding_attention" for layer in net.layers]
    return {
        "model_type": "qwen3",
        **{key: getattr(net.config, key) for key in _LAYER_KEYS},
        "rope_theta": net.config.rope_parameters["rope_theta"],
        "max_position_embeddings": target.max_position_embeddings,
        "vocab_size": target.vocab_size,
        "tie_word_embeddings": False,
        "layer_types": kinds,
        "use_sliding_window": "sliding_attention" in kinds,
        "sliding_window": next((layer.window for layer in net.layers if layer.window), None),
    }


def _plain(net: Any, target: PreTrainedModel, layers: dict[str, Any], method: str) -> dict[str, Any]:
    """The layout of z-lab (DFlash) and DeepSpec (DSpark): ids of layers count outputs."""
    count, reading = target.config.get_text_config().num_hidden_layers, net.reading
    ids = [count - 1 if state == -1 else state - 1 for state in net.states]
    found = {"mask_token_id": net.mask_token, "target_layer_ids": ids}
    scales = {
        "input_embedding_scale": reading.embedding_scale,
        "output_multiplier": reading.logit_scale,
        "final_logit_softcapping": reading.logit_cap,
    }
    scaled = {key: value for key, value in scales.items() if value not in (1.0, None)}
    if method == "dspark" and scaled:
        raise ValueError(f"format='plain': files of DSpark cannot say {', '.join(scaled)}.")
    causal = _sliding_are_causal(net)
    nested = found | {"causal": causal} | scaled
    return {
        **layers,
        "num_target_layers": count,
        **({} if causal or not layers["use_sliding_window"] else {"is_causal": False}),
        **({"dflash_config": nested} if method == "dflash" else found),
    }


def _speculators(net: Any, target: PreTrainedModel, layers: dict[str, Any], method: str) -> dict[str, Any]:
    """The layout of `speculators`: ids of layers are states, and only a smaller vocabulary has an LM head of its own."""
    own = net.embed_tokens is not None or (net.vocab is not None and net.target_ids is None)
    scales = net.reading.embedding_scale, net.reading.logit_scale, net.reading.logit_cap
    if own or -1 in net.states or scales != (1.0, 1.0, None):
        raise ValueError(
            "The format of speculators has no place for embeddings or a whole LM head of the draft's own, for the state that "
            "the LM head reads, nor for scales of embeddings and logits; write this draft as format='plain'."
        )
    return {
        **speculators_keys(method, net.depth, target),
        "transformer_layer_config": layers,
        "aux_hidden_state_layer_ids": list(net.states),
        "mask_token_id": net.mask_token,
        "sliding_window_non_causal": not _sliding_are_causal(net),
    }


def _sliding_are_causal(net: Any) -> bool:
    """Whether layers with a window are causal; those without must not be."""
    sliding, full = ({layer.causal for layer in net.layers if bool(layer.window) == has} for has in (True, False))
    if len(sliding) > 1 or True in full:
        raise ValueError(f"causal={net.reading.causal}: files hold one flag, for the layers that have a window.")
    return True in sliding


def _tensors(net: Any, vocab: int) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in net.state_dict().items() if name != "target_ids"}
    return tensors | marked(net.target_ids, vocab)
