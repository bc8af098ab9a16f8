"""Models and tokenizers from GGUF files, which llama.cpp writes: weights of any of its formats, mixed ones too, made dense."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = ("gguf", "accelerate")  # transformers reads GGUF files with them


def read_model(file: Path, dtype: torch.dtype, **loading: Any) -> PreTrainedModel:
    """The model in eval mode, with dense weights of this type; `save_pretrained` writes it like any other.

    Args:
        loading: more for `from_pretrained`, as `device_map`.

    Raises:
        ValueError: the file is not there or not readable, its weights have a format that is not known, or the packages that
            read it are not installed.
    """
    with _told(file):
        options = {"quantization_config": GgufConfig(dequantize=True), "local_files_only": True, **loading}
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **options).eval()


def read_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer with its chat template; errors are those of `read_model`."""
    with _told(file):
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Errors of reading a file name it and the cure."""
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; name a GGUF file.")
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise ValueError(f"{file}: GGUF files are read with {' and '.join(missing)}: pip install {' '.join(missing)}.")
    try:
        yield
    except (ValueError, NotImplementedError, KeyError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read: {error}. If the file is whole, write it in another format with llama.cpp's "
            "llama-quantize (F16, Q8_0, Q4_1 and Q4_K_M are read), or name a folder of the model that transformers loads."
        ) from error
