"""How long a text a model can read, and why no longer one."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedModel


class ContextLimit(NamedTuple):
    """The longest text, in tokens, whose logits do not depend on how it was cut into forward passes."""

    tokens: int | None  # None if unbounded
    reason: str = ""  # words to put after the number, where it is not the model's own limit


def context_limit_of(model: PreTrainedModel) -> ContextLimit:
    """The limit that a model's configuration states."""
    config = model.config.get_text_config()
    limits = [ContextLimit(getattr(config, "max_position_embeddings", None))]
    rope = getattr(config, "rope_parameters", None) or {}
    for rotary in [rope, *(each for each in rope.values() if isinstance(each, dict))]:
        if rotary.get("rope_type") == "longrope":
            anew = " (beyond it LongRoPE rotates every key anew, those in the cache included)"
            limits.append(ContextLimit(rotary["original_max_position_embeddings"], anew))
    if getattr(config, "attn_temperature_tuning", False):
        steps = " (beyond it Llama 4 scales by the slot in the cache, not the position in the text)"
        limits.append(ContextLimit(config.floor_scale - 1, steps))
    return min((limit for limit in limits if limit.tokens is not None), default=ContextLimit(None))
