"""What a draft's checkpoint says of its layers and its tokens. Shapes of tensors are trusted over keys of `config.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

_KEPT = ("rms_norm_eps", "hidden_act", "max_position_embeddings", "rope_theta", "rope_parameters", "rope_scaling",
         "sliding_window", "layer_types", "bos_token_id", "eos_token_id")  # fmt: skip
_SIZED = ("fc.weight", *(f"layers.0.{part}_proj.weight" for part in ("self_attn.q", "self_attn.k", "mlp.gate")))
_ROTARY = ("default", "linear", "yarn", "llama3")  # what is the same in a text of any length


def layer_config(keys: Mapping[str, Any], tensors: Mapping[str, Tensor], hidden: int, vocab: int) -> LlamaConfig:
    """The config of a network's layers, named `layers.0.self_attn.q_proj.weight` and so on.

    Args:
        keys: a config of the draft, never of the target: rotary positions, epsilon and activation are taken from it.
        tensors: the checkpoint's.
        hidden: size of the network's stream.
        vocab: size of the target's vocabulary.
    """
    q, k = (tensors[f"layers.0.self_attn.{x}_proj.weight"].shape[0] for x in "qk")
    size = keys.get("head_dim") or hidden // keys.get("num_attention_heads", LlamaConfig.num_attention_heads)
    if (norm := tensors.get("layers.0.self_attn.q_norm.weight")) is not None:
        size = len(norm)
    if q % size or k % size:
        raise ValueError(f"head_dim={size} divides no q_proj of {q} rows and k_proj of {k}; correct it in config.json.")
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=tensors["layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=count(tensors, "layers."),
        num_attention_heads=q // size,
        num_key_value_heads=k // size,
        head_dim=size,
        attention_bias="layers.0.self_attn.q_proj.bias" in tensors,
        vocab_size=vocab,
        **{key: keys[key] for key in _KEPT if keys.get(key) is not None},
    )
    rotary: Any = config.rope_parameters
    if rotary["rope_type"] not in _ROTARY or rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rope_parameters={rotary}: must be of type {', '.join(_ROTARY)}, over the whole of each head."
        )
    return config


def check_names(tensors: Mapping[str, Tensor], kind: str) -> None:
    """Raise ValueError unless a checkpoint of this kind has the tensors that its sizes are read from."""
    if missing := [name for name in _SIZED if name not in tensors]:
        raise ValueError(f"it lacks {', '.join(missing)}; give the checkpoint of {kind}.")


def count(tensors: Iterable[str], prefix: str) -> int:
    """How many modules there are whose names begin with `prefix` and a number."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)})


def target_ids(tensors: Mapping[str, Tensor], vocab: int) -> Tensor | None:
    """[drafted] int64: the target's ids of the tokens that a draft knows; None if it knows all.

    `d2t` holds offsets: to the id of a token in the draft they add up to that in the target. Engines read `t2d`, which marks
    the tokens of the target that are known, only if there is no `d2t`, and so it is here.

    Args:
        tensors: the checkpoint's.
        vocab: size of the target's vocabulary.
    """
    marks, offsets, drafted = tensors.get("t2d"), tensors.get("d2t"), own_head(tensors)
    if marks is not None and len(marks) != vocab:
        raise ValueError(
            f"t2d marks tokens of {len(marks)}, the target knows {vocab}; use a draft made for this target."
        )
    if offsets is None and (marks is None or drafted == vocab):
        if drafted not in (None, vocab):
            raise ValueError(
                f"lm_head.weight drafts {drafted} tokens, the target knows {vocab}, and no d2t says which; use another draft."
            )
        return None
    ids = marks.nonzero()[:, 0] if offsets is None else offsets.long() + torch.arange(len(offsets))  # type: ignore[union-attr]
    if len(ids) != drafted:
        rows = f"drafts {drafted}" if drafted else "is not there"
        raise ValueError(f"d2t or t2d knows {len(ids)} tokens, and lm_head.weight {rows}; get the checkpoint anew.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"d2t leads to ids {low} to {high}, the target knows {vocab}; use a draft made for this target."
        )
    if len(ids.unique()) < len(ids):
        ids, counts = ids.unique(return_counts=True)
        raise ValueError(f"d2t leads twice to id {int(ids[counts > 1][0])}: it must hold offsets, and no id twice.")
    return ids


def marked(ids: Tensor | None, vocab: int) -> dict[str, Tensor]:
    """The tensors that `target_ids` reads as these ids; none for None."""
    if ids is None:
        return {}
    ids = ids.cpu()
    known = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
    return {"d2t": ids - torch.arange(len(ids)), "t2d": known}


def own_head(tensors: Mapping[str, Tensor]) -> int | None:
    """How many tokens the draft's own LM head drafts; None if it has none, and uses the target's."""
    return len(tensors["lm_head.weight"]) if "lm_head.weight" in tensors else None


def own_embedding(tensors: Mapping[str, Tensor], hidden: int, target: Any) -> int | None:
    """How many tokens the draft's own embedding has; None if it has none, and uses that of the target with this config."""
    own = tensors.get("embed_tokens.weight")
    if own is None and hidden != target.hidden_size:
        raise ValueError(
            f"it has no embed_tokens.weight, and the target's are of size {target.hidden_size}, not {hidden}."
        )
    if own is not None and len(own) != target.vocab_size:
        raise ValueError(
            f"embed_tokens.weight knows {len(own)} tokens, the target {target.vocab_size}; use a draft made for this target."
        )
    return None if own is None else len(own)


def check_states(states: Sequence[int], tensors: Mapping[str, Tensor], target: Any) -> None:
    """Raise ValueError unless the target with this config has these states, and `fc` takes as many numbers as they are."""
    width, size, layers = tensors["fc.weight"].shape[1], target.hidden_size, target.num_hidden_layers
    if len(states) * size != width:
        raise ValueError(
            f"fc.weight takes {width} numbers, and states {tuple(states)} of this target are {len(states)} x {size}. "
            "Use a draft made for this target, or pass states=, as many as fc.weight takes."
        )
    if not all(-1 <= state < layers for state in states):
        raise ValueError(
            f"it reads states {tuple(states)}, and this target has layers 0 to {layers - 1}. Use a draft made for this target, "
            "or pass states=: i for what layer i reads, -1 for what the LM head reads."
        )


def leave_copies(tensors: dict[str, Tensor], target: PreTrainedModel) -> None:
    """Leave out copies of the target's embedding and LM head, which a network can use itself."""
    parts = (("embed_tokens.weight", target.get_input_embeddings(), nn.Embedding),
             ("lm_head.weight", target.get_output_embeddings(), nn.Linear))  # fmt: skip
    for name, part, plain in parts:
        own = tensors.get(name)
        if own is None or type(part) is not plain or getattr(part, "bias", None) is not None:
            continue
        theirs: Any = part.weight
        if own.shape == theirs.shape and torch.equal(own.to(theirs.device, theirs.dtype), theirs):
            del tensors[name]
