"""The settings of a job as a journal holds them: all that decides its texts, but for rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from specdec.journal.described import described
from specdec.models.digest import config_digest, digest, plain_json, weights_digest
from specdec.sampling import Sampling

if TYPE_CHECKING:
    from specdec.request import Request, Text


def settings_of(request: Request) -> dict[str, Any]:
    """Readable names, each with a number, a text or a short hash. Another process gives the same for the same job.

    Of a request whose texts have not been begun. Left out is what changes no text but for rounding: the size of batches, the
    engine, the device. Models are told apart by their class, their config and their weights, other objects by `described`.
    """
    target, drafter = request.target, request.drafter
    return {
        "target": described(target, public=True),
        **_of_models("target", [] if target.model is None else [target.model]),
        "drafter": described(drafter, public=True),
        **_of_models("drafter", drafter.models),
        "rule": described(request.rule, public=True),
        **_of_sampling(request.sampling),
        "stop tokens": sorted({*request.stop_tokens}),
        "stopping": None if request.stopping is None else described(request.stopping),
        "seed": request.seed,
        "first index": request.first_index,
        "texts": len(request.texts),
        "num_samples": request.num_samples,
        "prompts' hash": _of_prompts(request.texts, request.first_index),
        "max_new_tokens": _of_budgets([text.left for text in request.texts]),
        "logprobs": bool(request.notes),
    }


def _of_models(whose: str, found: Sequence[nn.Module]) -> dict[str, str]:
    """The config, the dtype and the weights of models. An empty text where there are none."""
    dtypes = (str(model.dtype) for model in found if isinstance(model, PreTrainedModel))
    return {
        f"{whose}'s config": " ".join(map(config_digest, found)),
        f"{whose}'s dtype": " ".join(dtypes),
        f"{whose}'s weights": " ".join(map(weights_digest, found)),
    }


def _of_sampling(sampling: Sampling) -> dict[str, Any]:
    """The fields of a sampling. Of a generation config all but its budget, which is each prompt's own."""
    config = None if sampling.generation_config is None else sampling.generation_config.to_dict()
    kept = {name: value for name, value in (config or {}).items() if name not in ("max_new_tokens", "max_length")}
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "processors": [described(processor) for processor in sampling.processors],
        "generation config": config and digest(plain_json(kept)),
    }


def _of_prompts(texts: Sequence[Text], first: int) -> str:
    """A hash of token ids, and of what tells the texts' coins apart; `first` is the index of the first prompt."""
    ids = (np.ascontiguousarray(text.tokens, "<i8").tobytes() for text in texts)
    return digest(np.array([(text.index, text.key - first) for text in texts], "<i8").tobytes(), *ids)


def _of_budgets(budgets: Sequence[int]) -> int | str:
    """The number that all texts have in common, or a hash of all numbers."""
    return budgets[0] if len({*budgets}) == 1 else digest(np.array(budgets, "<i8").tobytes())
