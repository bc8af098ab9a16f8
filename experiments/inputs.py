"""What an experiment decodes: models by name, and prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import specdec
from experiments import calls
from experiments.results import provenance
from specdec import Sampling
from specdec.drafters import MedusaHeads


class Setting(NamedTuple):
    """What every experiment on models begins with."""

    models: Any  # `Models`, or the demo pair
    prompts: list[torch.Tensor]  # 1-D int64
    sampling: Sampling
    log: Any  # with `write`, see `experiments.results`
    source: dict[str, Any]  # provenance, as it was when the experiment began


def begin(script: str, config: DictConfig) -> Setting:
    """Check a configuration, then make everything in it that is made once; transformers is to be quiet about it."""
    options = OmegaConf.to_container(config)
    calls.check(options)
    source = provenance(script, list(HydraConfig.get().overrides.task), options, config.device)
    torch.set_num_threads(config.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    log, sampling, texts, models = (instantiate(config[group]) for group in ("log", "sampling", "task", "target"))
    ids = [torch.tensor(models.tokenizer(text)["input_ids"]) for text in texts]
    return Setting(models, ids, sampling, log, source)


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
) -> Models:
    """Models by their names on the hub, or from local folders; Medusa heads from a folder."""
    drafting = _model(draft, dtype) if draft is not None else None
    medusa = MedusaHeads.load(heads).to(dtype) if heads is not None else None
    return Models(_model(target, dtype), drafting, AutoTokenizer.from_pretrained(tokenizer), medusa)


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
