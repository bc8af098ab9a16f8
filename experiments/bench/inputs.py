"""What an experiment begins with: its settings made, and its prompts turn by turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

import specdec
from experiments.bench.prompts import Prompt
from experiments.bench.results import provenance
from specdec import Sampling


class Turn(NamedTuple):
    """Where a prompt comes from."""

    task: str
    number: int  # 0: it begins a conversation; otherwise the prompt before it is the turn before


@dataclass(frozen=True)
class Setting:
    """What every experiment on models begins with."""

    models: Any  # `Models`, or the demo pair
    prompts: list[torch.Tensor]  # 1-D int64
    turns: list[Turn]  # of each prompt
    sampling: Sampling
    log: Any  # with `write`, see `experiments.bench.results`
    source: dict[str, Any]  # provenance, as it was when the experiment began

    @property
    def draft(self) -> PreTrainedModel:
        """The draft model, where it is to run; the experiment ends if there is none."""
        if self.models.draft is None:
            raise SystemExit("target.draft is not set: name the draft model that this is about.")
        return self.models.draft.to(self.source["options"]["device"])


def begin(script: str, config: DictConfig) -> Setting:
    """Make everything in a configuration that is made once."""
    source = settled(script, config)
    log, sampling, prompts = (instantiate(config[group]) for group in ("log", "sampling", "task"))
    models = loaded(config)
    ids, turns = map(list, zip(*in_turns(prompts, models, sampling, config.new_tokens), strict=True))
    return Setting(models, ids, turns, sampling, log, source)


def settled(script: str, config: DictConfig) -> dict[str, Any]:
    """Set what holds for the whole process. Returns where results come from."""
    options = OmegaConf.to_container(config)
    torch.set_num_threads(config.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return provenance(script, list(HydraConfig.get().overrides.task), options, config.device)


def loaded(config: DictConfig) -> Any:
    """The models of the configuration, with the target where it is to run."""
    models = instantiate(config.target)
    if not hasattr(models.target, "hf_device_map"):  # over several devices it stays where it was put
        models.target.to(config.device)
    if config.weights is not None:
        for model in filter(None, (models.target, models.draft)):
            specdec.store_weights(model, config.weights)
    return models


def in_turns(
    prompts: list[Prompt], models: Any, sampling: Sampling, new_tokens: int
) -> Iterator[tuple[torch.Tensor, Turn]]:
    """Every turn of every prompt as token ids.

    What comes before a later turn are the earlier ones and the target's own answers, the same for every method, so that
    methods stay paired.
    """
    options = {"sampling": sampling, "max_new_tokens": new_tokens, "tokenizer": models.tokenizer, "keep": True}
    target = specdec.ModelTarget(models.target)
    for prompt in prompts:
        said: list[str] = []
        last = None
        for number, turn in enumerate(prompt.turns):
            if said:
                last = specdec.generate(target, ids_of(models.tokenizer, said, prompt.chat), resume=last, **options)
                said += last.text or []
            said.append(turn)
            yield ids_of(models.tokenizer, said, prompt.chat), Turn(prompt.task, number)


def in_batches(
    prompts: list[torch.Tensor], turns: list[Turn], size: int
) -> Iterator[tuple[list[torch.Tensor], str, bool]]:
    """So many conversations at once, turn by turn: their prompts, tasks, and whether these follow those of the last batch."""
    starts = [i for i, turn in enumerate(turns) if turn.number == 0]
    talks = [range(*ends) for ends in pairwise([*starts, len(turns)])]
    for together in (talks[i : i + size] for i in range(0, len(talks), size)):
        for number in range(max(map(len, together))):
            rows = [talk[number] for talk in together if number < len(talk)]
            yield [prompts[i] for i in rows], " and ".join(dict.fromkeys(turns[i].task for i in rows)), number > 0


def ids_of(tokenizer: Any, said: list[str], chat: bool) -> torch.Tensor:
    """Token ids of a conversation in which the user spoke first and last."""
    if not chat:
        return torch.tensor(tokenizer("\n\n".join(said))["input_ids"])
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written them
