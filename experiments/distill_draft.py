"""Trains a small draft model for a target on text of the target's own making, once for every loss, and compares them.

    python experiments/distill_draft.py                       # the demo pair: about half an hour on one CPU core
    python experiments/distill_draft.py target=hub target.target=NAME target.draft=NAME task=file task.path=FILE '~losses.lk'

All losses see the same texts in the same order. Losses that look at the target's law pay for its forward pass, so
those that do not are trained once more, for as many operations. May be stopped at any time, and resumes: the target's
texts, the newest checkpoint of every run and the drafts are kept in `folder`. Settings are in `conf/distill_draft.yaml`.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("distill_draft", "distill_draft")

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from experiments.bench.inputs import Setting, begin
from experiments.bench.report import interval, markdown, mean, per_prompt
from experiments.bench.training import cost_of, fit, own_texts, take_up
from specdec import Sampling
from specdec.drafters import ModelDrafter
from specdec.rules import BlockVerification, SiblingRejection
from specdec.training.distillation import acceptance_by_depth, cross_entropy
from specdec.trees import Chain

Step = Callable[[PreTrainedModel, Tensor], Tensor]  # (draft, texts [batch, length]) -> loss
NO_TOKEN = -1
EXPECTED = {"token": False, "block": True}
MEASURED = {
    "measured, token": (SiblingRejection(), Sampling(1.0)),
    "measured, block": (BlockVerification(), Sampling(1.0)),
    "measured, greedy": (SiblingRejection(), Sampling()),
}


def main(config: DictConfig) -> None:
    if config.prompt_length is None:
        raise SystemExit(
            "prompt_length is null; drafts learn from what comes after so many tokens of each text: give a number."
        )
    setting, folder = begin("experiments/distill_draft.py", config), Path(config.folder)
    if setting.sampling != Sampling(1.0):
        raise SystemExit(
            f"sampling is {setting.sampling}; drafts are trained for temperature 1, so texts are drawn there."
        )
    take_up(folder, config)
    target = setting.models.target.requires_grad_(False)
    texts = torch.nn.utils.rnn.pad_sequence(own_texts(setting, config), True, NO_TOKEN)
    held_out, training = texts[: config.held_out], texts[config.held_out :]
    prompts = [torch.tensor(setting.models.tokenizer(p.turns[0])["input_ids"]) for p in instantiate(config.measured)]
    untrained = beginning(setting, config, 0)
    measured = partial(measure, target, held_out=held_out, prompts=prompts, config=config)
    history = {"before": [by_depth(target, untrained, held_out[:16], config)]}
    found = {"before": {"steps": 0, "flops": 0, "cpu_seconds": 0, "tau": [measured(untrained)]}}
    for name, (step, cost) in runs(target, untrained, training, config).items():
        found[name] = {**cost, "tau": []}
        for seed in config.seeds:
            run, draft = f"{name.replace(' ', '_')}_{seed}", beginning(setting, config, seed)
            evaluate = partial(by_depth, target, draft, held_out[:16], config)

            def loss(some: Tensor, _: torch.Generator, step=step, draft=draft) -> Tensor:
                return step(draft, some)

            path, steps = folder / f"{run}.pt", cost["steps"]
            history[run] = fit(draft, loss, training, evaluate, config, path, steps=steps, seed=seed)
            draft.save_pretrained(folder / run, is_main_process=calls.leads())
            found[name]["tau"].append(measured(draft))
    print(table(found), end="\n\n")
    figures = {name: {**row, "tau": summary(row, found)} for name, row in found.items()}
    result = {"prompts": len(prompts), "texts": len(training), "figures": figures, "history": history}
    print(setting.log.write({**setting.source, **result}))


def beginning(setting: Setting, config: DictConfig, seed: int) -> PreTrainedModel:
    """The draft that training begins with."""
    given = setting.draft
    torch.manual_seed(seed)
    return (type(given)(given.config) if config.scratch else deepcopy(given)).to(config.device).eval()


def runs(
    target: PreTrainedModel, draft: PreTrainedModel, texts: Tensor, config: DictConfig
) -> dict[str, tuple[Step, dict[str, Any]]]:
    """What is trained, by name, and what it costs."""
    losses = instantiate(config.losses).items()
    steps = {name: partial(loss_of, target, loss, config.prompt_length) for name, loss in losses}
    some = texts[: config.texts_per_step]
    costs = {name: cost_of(partial(step, draft, some), draft) for name, step in steps.items()}
    most = max(flops for flops, _ in costs.values())
    found = {}
    for name, (flops, seconds) in costs.items():
        counts = {name: config.steps}
        if flops < most:
            counts[f"{name} of equal cost"] = round(config.steps * most / flops)
        for label, count in counts.items():
            cost = {"steps": count, "flops": flops * count, "cpu_seconds": seconds * count}
            found[label] = (steps[name], cost)
    return found


def loss_of(target: PreTrainedModel, loss: Any, prompt_length: int, draft: PreTrainedModel, texts: Tensor) -> Tensor:
    """The loss on texts [batch, length] of which the target wrote all but the prompts."""
    target_law = None if loss.func is cross_entropy else law(target, texts)
    return loss(target_law, law(draft, texts), written(texts, prompt_length).to(draft.device))


def law(model: PreTrainedModel, texts: Tensor) -> Tensor:
    """[batch, place, vocab]: log-probabilities after every place but the last."""
    inputs = texts[:, :-1].clamp(min=0).to(model.device)
    return model(input_ids=inputs, use_cache=False).logits.float().log_softmax(-1)


def written(texts: Tensor, prompt_length: int) -> Tensor:
    """[batch, place]: the token after each place, `NO_TOKEN` where it is of the prompt."""
    tokens = texts[:, 1:].clone()
    tokens[:, : prompt_length - 1] = NO_TOKEN
    return tokens


@torch.no_grad()
def accepted(target: PreTrainedModel, draft: PreTrainedModel, texts: Tensor, config: DictConfig) -> dict[str, Tensor]:
    """By rule [text, depth]: the expected chance that so many tokens of a chain are accepted, at temperature 1."""
    found: dict[str, list[Tensor]] = {name: [] for name in EXPECTED}
    for part in texts.split(config.texts_per_step):
        tokens = written(part, config.prompt_length).to(draft.device)
        laws = law(target, part), law(draft, part)
        for name, block in EXPECTED.items():
            chance = acceptance_by_depth(*laws, tokens, config.depth, block)
            found[name] += [row[at >= 0].mean(0) for row, at in zip(chance, tokens[:, : chance.shape[1]], strict=True)]
    return {name: torch.stack(rows) for name, rows in found.items()}


def by_depth(target: PreTrainedModel, draft: PreTrainedModel, texts: Tensor, config: DictConfig) -> dict[str, Any]:
    """Acceptance rate at each depth of a chain, and the expected acceptance length, at temperature 1 on these texts."""
    means = {name: rows.mean(0) for name, rows in accepted(target, draft, texts, config).items()}
    rates = {f"alpha, {name}": (m / torch.cat([m.new_ones(1), m[:-1]])).tolist() for name, m in means.items()}
    return {**rates, **{f"tau, {name}": 1 + float(m.sum()) for name, m in means.items()}}


def measure(
    target: PreTrainedModel, draft: PreTrainedModel, held_out: Tensor, prompts: list[Tensor], config: DictConfig
) -> dict[str, np.ndarray]:
    """Tokens per target forward with a chain: expected [text] on held-out texts, and of decoding [prompt]; at temperature 1
    unless it says greedy.
    """
    drafter, options = ModelDrafter(draft, Chain(config.depth)), {"max_new_tokens": config.measured_tokens}
    expected = accepted(target, draft, held_out, config)
    return {
        **{f"expected, {name}": 1 + rows.sum(1).numpy(force=True) for name, rows in expected.items()},
        **{
            name: per_prompt([specdec.generate(target, prompts, drafter, rule=rule, sampling=sampling, **options)])
            for name, (rule, sampling) in MEASURED.items()
        },
    }


def summary(row: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By figure: tokens per forward, averaged over seeds, and what that is above the draft before training, paired."""
    after, before = ({n: np.mean([tau[n] for tau in r["tau"]], 0) for n in r["tau"][0]} for r in (row, found["before"]))
    return {n: {"tau": mean(after[n]), "gain": mean(after[n] - before[n])} for n in after}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: losses, what training cost, tokens per forward before training and what they gain, with 95 % intervals."""
    rows = [["loss", "steps", "TFLOP", "CPU s", *found["before"]["tau"][0]]]
    for name, row in found.items():
        which = "tau" if name == "before" else "gain"
        costs = [str(row["steps"]), f"{row['flops'] / 1e12:.1f}", f"{row['cpu_seconds']:.0f}"]
        rows.append(
            [name, *costs, *(interval(pair[which], digits=3, to=" to ") for pair in summary(row, found).values())]
        )
    return markdown(rows)
