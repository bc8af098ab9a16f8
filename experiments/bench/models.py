"""What an experiment decodes with: models by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import specdec
from specdec import Generation
from specdec.drafters import MedusaHeads
from specdec.huggingface.names import model
from specdec.huggingface.names import tokenizer as read_tokenizer


class Models(NamedTuple):
    """Models in eval mode that share one tokenizer, and heads for the target; `specdec.demo.Demo` has the same fields."""

    target: PreTrainedModel
    draft: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    heads: MedusaHeads | None


def load(
    target: str,
    tokenizer: str,
    draft: str | None = None,
    heads: str | None = None,
    dtype: torch.dtype = torch.float32,
    loading: Mapping[str, Any] | None = None,
) -> Models:
    """Models by their names on the hub, from local folders, or from GGUF files (`.gguf`); Medusa heads from a folder.

    Args:
        loading: more for the `from_pretrained` of the target: `device_map`, or `tp_plan` under torchrun.
    """
    drafting = model(draft, dtype) if draft is not None else None
    medusa = MedusaHeads.load(heads).to(dtype) if heads is not None else None
    return Models(model(target, dtype, **(loading or {})), drafting, read_tokenizer(tokenizer), medusa)


def smollm2(
    draft: str | None = None,
    heads: str | None = None,
    dtype: torch.dtype = torch.float32,
    loading: Mapping[str, Any] | None = None,
) -> Models:
    """SmolLM2-135M-Instruct, downloaded if it is not there, as the target of `load`."""
    made = str(specdec.demo.smollm2.folder())
    return load(made, made, draft, heads, dtype, loading)


class Rounded:
    """A method that decodes with the target's weights in another type or format, to be compared with methods that do not.

    Args:
        method: like `specdec.generate`.
        dtype: of the weights, which are copied when the method is first called; their own by default.
        weights: the format of `specdec.store_weights`, if they are stored in one.
    """

    def __init__(self, method: Callable[..., Generation], dtype: torch.dtype | None = None, weights: str | None = None):
        self._method, self._dtype, self._weights = method, dtype, weights
        self._copy: PreTrainedModel | None = None

    def __call__(self, target: PreTrainedModel, *args: Any, **options: Any) -> Generation:
        self._copy = self._copy or self._rounded(target)
        return self._method(self._copy, *args, **options)

    def _rounded(self, target: PreTrainedModel) -> PreTrainedModel:
        made = copy.deepcopy(target).to(dtype=self._dtype or target.dtype)  # type: ignore[arg-type] - its stub is wrong
        return made if self._weights is None else specdec.store_weights(made, self._weights)


def untrained(like: PreTrainedModel) -> PreTrainedModel:
    """A model of the same size that has learned nothing: the worst draft."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(like.config, dtype=like.dtype).eval().to(like.device)
