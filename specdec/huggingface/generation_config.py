"""The law of a transformers `GenerationConfig`: fields of `Sampling`, and the logits processors built from the rest."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from specdec.huggingface.call import LoopWithTokenizer

# transformers' warpers and the equal fields of `Sampling`, in the order in which they are applied
_WARPERS = (
    ("TemperatureLogitsWarper", "temperature"),
    ("TopKLogitsWarper", "top_k"),
    ("TopPLogitsWarper", "top_p"),
    ("MinPLogitsWarper", "min_p"),
)


def transformers_processors(
    model: PreTrainedModel, prompt: Tensor, config: GenerationConfig, max_new_tokens: int, tokenizer: Any
):
    """(prepared config, processors) as `model.generate` would use them, caught by a custom decoding loop."""
    caught: list[Any] = []

    def catch(model, input_ids, logits_processor, stopping_criteria, generation_config, tokenizer=None, **kwargs):
        caught.append((generation_config, logits_processor))
        return input_ids

    run: Any = model.generate
    config = copy.deepcopy(config)
    config.max_new_tokens, config.max_length = max_new_tokens, None
    loop = LoopWithTokenizer(catch)
    run(prompt[None].to(model.device), generation_config=config, tokenizer=tokenizer, custom_generate=loop)
    return caught[0]


def split(config: GenerationConfig, built: Sequence[Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Fields of `Sampling` for the four common warpers where they come last, and everything before them as processors."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"The generation config asks for {mode.value.replace('_', ' ')} (num_beams={config.num_beams}): only "
            "greedy search and sampling can be drafted for; set num_beams=1, and nothing that belongs to another mode."
        )
    kept, native, place = list(built), {"temperature": 1.0 if config.do_sample else 0.0}, len(_WARPERS)
    # `Sampling` applies its fields after all processors, and in this order.
    while config.do_sample and kept and 0 <= _place(kept[-1]) < place:
        place, warper = _place(kept[-1]), kept.pop()
        native[_WARPERS[place][1]] = getattr(warper, _WARPERS[place][1])
    return native, tuple(kept)


def _place(processor: Any) -> int:
    """The place in `_WARPERS` of a processor that a field of `Sampling` can replace; -1 if none can."""
    plain = getattr(processor, "filter_value", -math.inf) == -math.inf
    plain = plain and getattr(processor, "min_tokens_to_keep", 1) == 1
    names = [name for name, _ in _WARPERS]
    return names.index(type(processor).__name__) if plain and type(processor).__name__ in names else -1
