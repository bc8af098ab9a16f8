"""What an experiment begins with: its settings made, and its prompts turn by turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import specdec
from experiments import calls
from experiments.prompts import Prompt
from experiments.results import provenance
from specdec import Sampling


class Setting(NamedTuple):
    """What every experiment on models begins with."""

    models: Any  # `Models`, or the demo pair
    prompts: list[torch.Tensor]  # 1-D int64
    tasks: list[str]  # of each prompt
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
    log, sampling, prompts, models = (instantiate(config[group]) for group in ("log", "sampling", "task", "target"))
    models.target.to(config.device)
    ids, tasks = map(list, zip(*in_turns(prompts, models, sampling, config.new_tokens), strict=True))
    return Setting(models, ids, tasks, sampling, log, source)


def in_turns(
    prompts: list[Prompt], models: Any, sampling: Sampling, new_tokens: int
) -> Iterator[tuple[torch.Tensor, str]]:
    """Every turn of every prompt as token ids, with its task.

    What comes before a later turn are the earlier ones and the target's own answers, the same for every method, so that
    methods stay paired. Turns are prompts of their own: nothing is left in a cache for the next one.
    """
    for prompt in prompts:
        said: list[str] = []
        for turn in prompt.turns:
            if said:
                options = {"sampling": sampling, "max_new_tokens": new_tokens, "tokenizer": models.tokenizer}
                said += specdec.generate(models.target, _ids(models.tokenizer, said, prompt.chat), **options).text or []
            said.append(turn)
            yield _ids(models.tokenizer, said, prompt.chat), prompt.task


def _ids(tokenizer: Any, said: list[str], chat: bool) -> torch.Tensor:
    """Token ids of a conversation in which the user spoke first and last."""
    if not chat:
        return torch.tensor(tokenizer("\n\n".join(said))["input_ids"])
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written them
