"""Models and tokenizers by their names on the hub, from local folders, or from GGUF files (`.gguf`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specdec.huggingface.gguf import read_model, read_tokenizer


def model(name: str, dtype: torch.dtype, **loading: Any) -> PreTrainedModel:
    """A model in eval mode.

    Args:
        loading: more for `from_pretrained`.
    """
    file = Path(name)
    if file.suffix == ".gguf":
        return read_model(file, dtype, **loading)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **loading).eval()


def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer."""
    file = Path(name)
    return read_tokenizer(file) if file.suffix == ".gguf" else AutoTokenizer.from_pretrained(name)
