"""Trains Medusa heads for a frozen target on text of its own making. May be stopped at any time, and resumes.

    python experiments/train_medusa.py                       # for the demo target: about ten minutes on one CPU core
    python experiments/train_medusa.py target=hub target.target=NAME task=file task.path=FILE

Everything is kept in `folder`: the target's texts, the newest checkpoint, and at the end the heads in the layout of
published checkpoints. Settings are in `conf/train_medusa.yaml`.
"""

from __future__ import annotations

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from experiments import calls
from experiments.inputs import begin
from experiments.training import fit, own_texts
from specdec.drafters import MedusaDrafter, MedusaHeads
from specdec.training.medusa import acceptance_by_head, medusa_loss, places


@hydra.main(config_path="../conf", config_name="train_medusa", version_base="1.3")
def main(config: DictConfig) -> None:
    setting, folder = begin("experiments/train_medusa.py", config), Path(config.folder)
    target, end = setting.models.target.to(config.device), setting.models.tokenizer.eos_token_id or 0
    folder.mkdir(parents=True, exist_ok=True)
    texts = own_texts(setting, config, folder / "texts.pt")
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=end)
    held_out, training = padded[: config.held_out], padded[config.held_out :]
    heads = train(target, training, held_out, config, folder / "checkpoint.pt")
    heads.save(folder / "heads")
    found = {
        "acceptance_rate_by_head": by_head(target, heads, held_out),  # at temperature 1
        "acceptance_length": tau(target, heads, held_out, config.prompt_length),
    }
    print(f"acceptance rate by head: {' '.join(f'{rate:.3f}' for rate in found['acceptance_rate_by_head'])}")
    print(f"acceptance length on held-out prompts, greedy: {found['acceptance_length']:.2f}")
    print(folder / "heads")
    print(setting.log.write({**setting.source, "figures": found}))


def train(target: PreTrainedModel, texts: Tensor, held_out: Tensor, config: DictConfig, path: Path) -> MedusaHeads:
    """The heads after `config.steps` steps; the newest checkpoint is kept in `path`."""
    heads = MedusaHeads(config.heads, config.blocks, target.config.get_text_config().hidden_size).to(target.device)
    lm_head = lm_head_of(target)

    def loss(batch: Tensor) -> Tensor:
        return medusa_loss(heads, lm_head, places(target, batch.to(target.device), len(heads)), config.decay)

    fit(heads, loss, texts, lambda: {"rates": by_head(target, heads, held_out[:8])}, config, path, steps=config.steps)
    return heads.eval()


def lm_head_of(target: PreTrainedModel) -> torch.nn.Module:
    """The target's LM head, frozen."""
    head = target.requires_grad_(False).get_output_embeddings()
    assert head is not None
    return head


def by_head(target: PreTrainedModel, heads: MedusaHeads, texts: Tensor) -> list[float]:
    """Acceptance rate of each head at temperature 1 on these texts [text, length]."""
    parts = [places(target, row.to(target.device), len(heads), laws=True) for row in texts.split(8)]
    rates = [acceptance_by_head(heads, lm_head_of(target), part) for part in parts]
    return torch.stack(rates).mean(0).tolist()


def tau(target: PreTrainedModel, heads: MedusaHeads, texts: Tensor, prompt_length: int) -> float:
    """Acceptance length of greedy decoding with a chain over all heads, after the prompts of these texts."""
    prompts = list(texts[:16, :prompt_length])
    return specdec.generate(target, prompts, MedusaDrafter(heads), max_new_tokens=64).summary()["acceptance_length"]


if __name__ == "__main__":
    calls.run(main)
