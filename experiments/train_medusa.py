"""Trains Medusa heads for a frozen target on text of its own making. May be stopped at any time, and resumes.

    python experiments/train_medusa.py                       # for the demo target: about ten minutes on one CPU core
    python experiments/train_medusa.py target=hub target.target=NAME task=file task.path=FILE

Everything is kept in `folder`: the target's texts, the newest checkpoint, and at the end the heads in the layout of
published checkpoints. Settings are in `conf/train_medusa.yaml`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import specdec
from experiments import calls
from specdec.drafters import MedusaDrafter, MedusaHeads
from specdec.training.medusa import acceptance_by_head, medusa_loss, places
from specdec.training.self_distillation import continuations


@hydra.main(config_path="../conf", config_name="train_medusa", version_base="1.3")
def main(config: DictConfig) -> None:
    calls.check(OmegaConf.to_container(config))
    torch.set_num_threads(config.threads)
    transformers.utils.logging.disable_progress_bar()
    models, folder = instantiate(config.target), Path(config.folder)
    models.target.to(config.device)
    folder.mkdir(parents=True, exist_ok=True)
    texts = own_texts(models, config, folder / "texts.pt")
    held_out, training = texts[: config.held_out], texts[config.held_out :]
    heads = train(models.target, training, held_out, config, folder / "checkpoint.pt")
    heads.save(folder / "heads")
    rates = by_head(models.target, heads, held_out)
    print(f"acceptance rate by head at temperature 1: {' '.join(f'{rate:.3f}' for rate in rates)}")
    print(f"acceptance length on held-out prompts: {tau(models.target, heads, held_out, config.prompt_length):.2f}")
    print(folder / "heads")


def own_texts(models: Any, config: DictConfig, path: Path) -> Tensor:
    """[text, length] int64: prompts continued by the target; kept in `path` batch by batch."""
    done: list[Tensor] = torch.load(path, weights_only=True) if path.exists() else []
    prompts = instantiate(config.task)
    ids = [torch.tensor(models.tokenizer(text)["input_ids"][: config.prompt_length]) for text in prompts]
    ids = [row for row in ids if len(row) == config.prompt_length][len(done) :]
    length = config.prompt_length + config.new_tokens
    options = {"new_tokens": config.new_tokens, "batch": config.texts_at_once, "seed": len(done)}
    with tqdm(total=len(ids) + len(done), initial=len(done), desc="the target's texts") as bar:
        for batch in continuations(models.target, ids, **options):
            bar.update(len(batch))
            end = models.tokenizer.eos_token_id or 0
            done += [torch.nn.functional.pad(row, (0, length - len(row)), value=end) for row in batch]
            torch.save(done, path)
    return torch.stack(done)


def train(target: PreTrainedModel, texts: Tensor, held_out: Tensor, config: DictConfig, path: Path) -> MedusaHeads:
    """The heads after `config.steps` steps; the newest checkpoint is kept in `path`."""
    heads = MedusaHeads(config.heads, config.blocks, target.config.get_text_config().hidden_size).to(target.device)
    optimizer, lm_head = torch.optim.AdamW(heads.parameters(), lr=config.lr, weight_decay=0), lm_head_of(target)
    first = _resume(path, heads, optimizer)
    with tqdm(range(first, config.steps), initial=first, total=config.steps, desc="heads") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            generator = torch.Generator().manual_seed(step)
            batch = texts[torch.randint(len(texts), (config.texts_per_step,), generator=generator)]
            loss = medusa_loss(heads, lm_head, places(target, batch.to(target.device), len(heads)), config.decay)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % config.report_every == 0 or step + 1 == config.steps:
                rates = by_head(target, heads, held_out[:8])
                bar.set_postfix_str(f"loss {loss.item():.3f}, rates {' '.join(f'{rate:.2f}' for rate in rates)}")
                torch.save({"heads": heads.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, path)
    return heads.eval()


def _resume(path: Path, heads: MedusaHeads, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    heads.load_state_dict(saved["heads"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


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
