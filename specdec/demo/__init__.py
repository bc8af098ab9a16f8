"""A small trained pair that ships with the package: try every method offline, in seconds, on one CPU core.

    pair = specdec.demo.load()
    pair.tokenizer(pair.prompts[0].text)

`CARD.md` beside this file says what the models are, what they were trained on and how good they are. `specdec.demo.smollm2`
is a real chat model, which is downloaded.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from specdec.checks import check_kind
from specdec.demo import smollm2
from specdec.drafters import DSparkDrafter, Eagle3Drafter, MedusaHeads
from specdec.trees.base import TreePolicy

__all__ = ["FILES", "FOLDER", "Demo", "Prompt", "dspark", "eagle3", "load", "smollm2"]

FOLDER = Path(__file__).parent
FILES = (
    "target/model.safetensors",
    "draft/model.safetensors",
    "heads/medusa_lm_head.safetensors",
    "eagle3/model.safetensors",
    "dspark/model.safetensors",
    "tokenizer/tokenizer.json",
    "prompts.jsonl",
)


class Prompt(NamedTuple):
    """The beginning of a text that neither model was trained on; `task` is functions, docstrings, tests or prose."""

    id: str
    task: str
    text: str


class Demo(NamedTuple):
    """Models in eval mode on the CPU that share one tokenizer, of 4096 tokens, and 64 prompts of 60 to 200 tokens."""

    target: PreTrainedModel  # 6 layers, trained so that early exits of it are drafts too
    draft: PreTrainedModel  # 1 layer, distilled from the target
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    heads: MedusaHeads  # 4, trained for the target


def load(dtype: torch.dtype = torch.float32) -> Demo:
    """The pair, its tokenizer and its prompts, from the package's folder; `FileNotFoundError` without weights."""
    check_kind("dtype", dtype, torch.dtype, "pass a torch.dtype; for SmolLM2 call specdec.demo.smollm2.load()")
    for name in FILES:
        if not (FOLDER / name).exists():
            raise FileNotFoundError(
                f"{FOLDER / name} is missing: reinstall the package, or train (two hours on one CPU core) the pair with "
                "`python experiments/demo_pair/train.py` and the rest with `python experiments/train_drafter.py` (see CARD.md)."
            )
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer", local_files_only=True)
    rows = map(json.loads, (FOLDER / "prompts.jsonl").read_text("utf-8").splitlines())
    prompts = [Prompt(row["id"], row["task"], row["prompt"]) for row in rows]
    with _without_progress_bars():
        heads = MedusaHeads.load(FOLDER / "heads").to(dtype)
        return Demo(_model("target", dtype), _model("draft", dtype), tokenizer, prompts, heads)


def eagle3(target: PreTrainedModel, tree: TreePolicy | None = None) -> Eagle3Drafter:
    """The EAGLE-3 draft that was trained for the demo target. Arguments as for `Eagle3Drafter.from_pretrained`.

    >>> specdec.generate(pair.target, pair.prompts[0].text, specdec.demo.eagle3(pair.target), tokenizer=pair.tokenizer)
    """
    return Eagle3Drafter.from_pretrained(FOLDER / "eagle3", target, tree)


def dspark(target: PreTrainedModel, tree: TreePolicy | None = None, confidence: float | None = None) -> DSparkDrafter:
    """The DSpark draft that was trained for the demo target: blocks of 4. Arguments as for `DSparkDrafter`."""
    return DSparkDrafter.from_pretrained(FOLDER / "dspark", target, tree, confidence=confidence)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading takes a tenth of a second: nothing to watch."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=dtype, local_files_only=True).eval()
