"""Trains Medusa heads for a frozen target on text of its own making. May be stopped at any time, and resumes.

    python experiments/train_medusa.py                       # for the demo target: half an hour on one CPU core
    python experiments/train_medusa.py target=hub target.target=NAME task=file task.path=FILE

Everything is kept in `folder`: the target's texts, the newest checkpoint, and at the end the heads in the layout of
published checkpoints. Settings are in `conf/train_medusa.yaml`.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("train_medusa", "train_medusa")

from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from experiments.bench.inputs import begin
from experiments.bench.training import chosen, fit, lengths, own_texts, take_up
from specdec.drafters import MedusaDrafter, MedusaHeads
from specdec.training.medusa import States, acceptance_by_head, medusa_loss


def main(config: DictConfig) -> None:
    setting, folder = begin("experiments/train_medusa.py", config), Path(config.folder)
    target = setting.models.target
    take_up(folder, config)
    texts = own_texts(chosen(setting, config), config, folder / "texts.pt")
    seen, unseen = (
        States(target, part, config.prompt_length, config.heads, config.window)
        for part in (texts[config.held_out :], texts[: config.held_out])
    )
    prompts = [text[: config.prompt_length] for text in texts[: config.held_out]]
    heads = MedusaHeads(config.heads, config.blocks, target.config.get_text_config().hidden_size).to(target.device)
    loss, measured = partial(medusa_loss, heads, seen), partial(evaluate, heads, target, unseen, prompts)
    path = folder / "checkpoint.pt"
    few = partial(measured, windows=64, tokens=24)
    steps = fit(heads, loss, seen.starts, few, config, path, steps=config.steps, seed=config.seed)
    heads.eval().to(torch.bfloat16)
    if calls.leads():
        heads.save(folder / "heads")
    heads.to(target.dtype)  # rounded, as they will be loaded
    found = measured(windows=len(unseen.starts) // config.window, tokens=64)
    for name, value in found.items():
        print(f"{name}: {value}")
    data = {"texts": len(texts) - config.held_out, "states": len(seen.hidden)}
    result = {**setting.source, **data, "figures": found, "history": {"heads": steps}}
    print(folder / "heads", setting.log.write(result))


def evaluate(
    heads: MedusaHeads, target: PreTrainedModel, unseen: States, prompts: list[Tensor], windows: int, tokens: int
) -> dict[str, Any]:
    """Acceptance rate by head at temperature 1, and acceptance lengths of a chain over all heads, on texts not trained on."""
    chosen = unseen.starts[torch.linspace(0, len(unseen.starts) - 1, windows).long()]
    found: dict[str, Any] = {"rates": acceptance_by_head(heads, unseen, chosen)}
    return found | lengths(target, prompts, MedusaDrafter(heads), tokens)
