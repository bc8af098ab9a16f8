"""What training a drafter is, whatever is trained: the target's own texts, and steps that may be stopped at any time."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from experiments.bench.inputs import Setting
from experiments.bench.results import keep_settings, whole
from specdec.training.self_distillation import continuations

# settings that change nothing that is trained, so that a run may go on with others
FREE = {"folder", "log", "device", "threads", "report_every", "seeds", "measured", "measured_tokens", "laws_at_once",
        "tree", "rule"}  # fmt: skip
# settings that texts are made with
OF_TEXTS = ("target", "task", "sampling", "prompt_length", "new_tokens", "texts", "seed", "texts_at_once", "dtype")


def take_up(folder: Path, config: DictConfig) -> None:
    """Begin or go on in this folder; refuse one that is of other settings, whose texts and checkpoints are no part of this."""
    options: Any = OmegaConf.to_container(config, resolve=True)
    keep_settings(folder, {key: value for key, value in options.items() if key not in FREE})


def chosen(setting: Setting, config: DictConfig) -> Setting:
    """The setting with at most `config.texts` of its prompts, chosen at random."""
    order = torch.randperm(len(setting.prompts), generator=torch.Generator().manual_seed(config.seed))
    return replace(setting, prompts=[setting.prompts[i] for i in order[: config.texts].tolist()])


def beginnings(setting: Setting, config: DictConfig) -> list[Tensor]:
    """What the target continues: the prompts, or as many tokens of each if `config.prompt_length` says so.

    Prompts of one token are left out: behind these, networks on the target's states draft from nothing.
    """
    length = config.prompt_length
    return [ids[:length] for ids in setting.prompts if len(ids) >= (length or 2)]


def own_texts(setting: Setting, config: DictConfig) -> list[Tensor]:
    """The `beginnings`, with what the target makes of them.

    They are kept in `folder`, some batches at a time, unless another folder (`texts_from`) has them all.
    """
    path = Path(config.texts_from or config.folder) / "texts.pt"
    done: list[Tensor] = torch.load(path, weights_only=True) if path.exists() else []
    prompts = beginnings(setting, config)
    if config.texts_from:
        _check_same(config, path, len(done), len(prompts))
    options = {"sampling": setting.sampling, "new_tokens": config.new_tokens, "batch": config.texts_at_once}
    with tqdm(total=len(prompts), initial=len(done), desc="the target's texts") as bar:
        for batch in continuations(setting.models.target, prompts[len(done) :], first_index=len(done), **options):
            bar.update(len(batch))
            done += batch
            _save(done, path)
    return done


def _check_same(config: DictConfig, path: Path, there: int, due: int) -> None:
    """Exit unless the texts at `path` are all that this configuration would make: it writes nothing in another's folder."""
    settings = path.with_name("settings.json")
    made: Any = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
    mine: Any = json.loads(json.dumps(OmegaConf.to_container(config, resolve=True)))
    differing = [key for key in OF_TEXTS if key in made and key in mine and made[key] != mine[key]]
    if differing or there != due:
        about = (
            f"other settings ({', '.join(differing)})" if differing else f"{there} texts where there are to be {due}"
        )
        raise SystemExit(f"texts_from={path.parent} has {about}: let its own run make them, or leave texts_from out.")


def fit(
    module: torch.nn.Module,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    texts: Tensor,
    evaluate: Callable[[], dict[str, Any]],
    config: DictConfig,
    path: Path,
    *,
    steps: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Train `module` in place; returns the loss and what `evaluate` said, every `config.report_every` steps.

    All that is random is a function of seed and step, so a run that was stopped goes on from its newest checkpoint, in
    `path`, as if it had not been.

    Args:
        loss: of a batch, some rows of `texts`, and what else is random in a step.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, weight_decay=0)
    first, history = _resume(path, module, optimizer)
    with tqdm(range(first, steps), initial=first, total=steps, desc=path.stem) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            generator = torch.Generator().manual_seed(1_000_000 * seed + step)
            rows = torch.randint(len(texts), (config.texts_per_step,), generator=generator)
            value = loss(texts[rows], generator)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if (step + 1) % config.report_every == 0 or step + 1 == steps:
                history.append({"step": step + 1, "loss": value.item(), **evaluate()})
                bar.set_postfix_str(", ".join(f"{name} {_short(found)}" for name, found in history[-1].items()))
                states = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
                _save({**states, "step": step + 1, "history": history}, path)
    return history


def cost_of(loss: Callable[[], Tensor], module: torch.nn.Module) -> tuple[int, float]:
    """Floating point operations in the matrix products of a step, backward pass included, and its CPU seconds."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    began = time.process_time()
    loss().backward()
    seconds = time.process_time() - began
    module.zero_grad()
    return counter.get_total_flops(), seconds


def peak_memory(device: str) -> float:
    """The most memory that this process has held, in GB: of the GPU, or of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # in kB, on Linux


def _resume(path: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]]:
    """The step to go on from, and what was reported before it."""
    if not path.exists():
        return 0, []
    saved = torch.load(path, weights_only=True)
    module.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["history"]


def _save(state: Any, path: Path) -> None:
    with whole(path) as file:
        torch.save(state, file)


def _short(found: Any) -> str:
    return " ".join(f"{x:.2f}" for x in found) if isinstance(found, list) else f"{found:.3f}".removesuffix(".000")
