"""What an experiment decodes: models by name, and prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import specdec


class Models(NamedTuple):
    """Models in eval mode that share one tokenizer; `specdec.demo.Demo` has the same fields."""

    target: PreTrainedModel
    draft: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase


def load(target: str, tokenizer: str, draft: str | None = None, dtype: torch.dtype = torch.float32) -> Models:
    """Models by their names on the hub, or from local folders."""
    drafting = _model(draft, dtype) if draft is not None else None
    return Models(_model(target, dtype), drafting, AutoTokenizer.from_pretrained(tokenizer))


def demo_prompts(tasks: Sequence[str], per_task: int) -> list[str]:
    """The first prompts of each of these tasks of the demo pair."""
    rows = list(map(json.loads, (specdec.demo.FOLDER / "prompts.jsonl").read_text("utf-8").splitlines()))
    known = {row["task"] for row in rows}
    if unknown := set(tasks) - known:
        raise SystemExit(f"task.tasks: there are no demo prompts for {sorted(unknown)}; choose from {sorted(known)}.")
    return [prompt for task in tasks for prompt in [r["prompt"] for r in rows if r["task"] == task][:per_task]]


def read_prompts(path: str, limit: int | None = None) -> list[str]:
    """The first `limit` prompts of a file: `.jsonl` has objects with a "prompt", any other file one prompt a line."""
    lines = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()][:limit]
    if not lines:
        raise SystemExit(f"task.path={path}, task.limit={limit}: there is no prompt in it.")
    return [json.loads(line)["prompt"] for line in lines] if path.endswith(".jsonl") else lines


def _model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
