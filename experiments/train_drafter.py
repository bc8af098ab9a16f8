"""Trains a network on a frozen target's states, on text of the target's own making. May be stopped at any time, and resumes.

    python experiments/train_drafter.py                    # EAGLE-3, for the demo target: half an hour on one CPU core
    python experiments/train_drafter.py net=dspark         # or dflash, eagle, medusa
    python experiments/train_drafter.py task.count=80 texts=64 held_out=8 new_tokens=64 steps=40 report_every=20  # a try
    python experiments/train_drafter.py target=hub target.target=NAME task=file task.path=FILE net=eagle3 drafted=32000

Everything is kept in `folder`: the target's texts, the newest checkpoint, and at the end, in `net`, the network as engines read
it. While it trains it prints how often drafts are accepted by depth, 1 - TV; at the end, on texts not trained on, the
acceptance length that follows for the rule and the tree chosen, and the one that is served, which must agree. Settings are in
`conf/train_drafter.yaml`; `texts_from=FOLDER` takes the texts of another folder.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("train_drafter", "train_drafter")

import math
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

import specdec
from experiments.bench.inputs import Setting, begin
from experiments.bench.report import interval, per_prompt
from experiments.bench.training import beginnings, chosen, cost_of, fit, own_texts, peak_memory, take_up
from specdec.drafters import StatesDrafter
from specdec.prediction import NotForetold, read_along
from specdec.sampling import Sampling
from specdec.training import distillation
from specdec.training.features import Features
from specdec.training.states import Comparison, acceptance, states_loss
from specdec.trees import Static, Widths

NO_TOKEN = -1


def main(config: DictConfig) -> None:
    setting, folder = begin("experiments/train_drafter.py", config), Path(config.folder)
    target = setting.models.target.requires_grad_(False)
    check(config, setting)
    take_up(folder, config)
    setting = chosen(setting, config)
    unseen, seen = split(own_texts(setting, config), [len(ids) for ids in beginnings(setting, config)], config)
    torch.manual_seed(config.seed)
    drafter = instantiate(config.net)(target, instantiate(config.tree), **known(seen, config))
    net, rows = drafter.net.train(), torch.arange(len(seen.tokens))
    features = Features(target, net, *seen, folder if config.keep_features else None)

    def loss(rows: Tensor, generator: torch.Generator, features: Features = features) -> Tensor:
        text, dtype = features[rows], config.autocast and getattr(torch, config.autocast)
        with torch.autocast(target.device.type, dtype, enabled=dtype is not None):
            comparison = Comparison(net, target, text, config.depth, config.anchors, generator)
            return states_loss(weighted(config), comparison, config.decay, config.laws_at_once)

    computed = Features(target, net, *seen)  # whatever is kept
    flops, seconds = cost_of(partial(loss, rows[: config.texts_per_step], torch.Generator(), computed), net)
    steps = config.steps if config.flops is None else round(config.flops / flops)
    some = Texts(unseen.tokens[:16], unseen.firsts[:16])
    few = partial(by_depth, drafter, target, Features(target, net, *some), config)
    history = fit(net, loss, rows, few, config, folder / "training.pt", steps=steps, seed=config.seed)
    net.eval().to(torch.bfloat16)
    if calls.leads():
        drafter.save_pretrained(folder / "net", target=target)
    net.to(target.dtype)  # rounded, as it will be loaded
    found = measured(drafter, setting, unseen, config)
    cost = {"steps": steps, "flops": flops * steps, "cpu_seconds": seconds * steps, "gb": peak_memory(config.device)}
    size = {"texts": len(rows), "parameters": sum(p.numel() for p in net.parameters())}
    result = {**setting.source, **size, **cost, "figures": found, "history": {"net": history}}
    where = setting.log.write(result)
    load = f'specdec.drafters.{type(drafter).__name__}.from_pretrained("{folder / "net"}", target)'
    print(report(found, cost), f"load it: {load}", where, sep="\n")


def check(config: DictConfig, setting: Setting) -> None:
    """Exit, before anything is computed, if this would end in an error."""
    if not 1 <= config.held_out < config.texts:
        raise SystemExit(
            f"held_out={config.held_out}: must be from 1 to {config.texts - 1}, fewer than texts={config.texts}."
        )
    drafter = instantiate(config.net)(setting.models.target, instantiate(config.tree))
    if not hasattr(drafter, "save_pretrained"):
        raise SystemExit(
            f"{type(drafter).__name__} has no save_pretrained(folder, target=...) to keep what is trained."
        )
    try:
        instantiate(config.rule).check(drafter.spec(setting.sampling))
    except ValueError as error:
        raise SystemExit(str(error)) from None


class Texts(NamedTuple):
    """What the target wrote: token ids [n, t] int64, negative after the end of a text, and tokens per prompt [n] int64."""

    tokens: Tensor
    firsts: Tensor


def split(texts: list[Tensor], firsts: list[int], config: DictConfig) -> tuple[Texts, Texts]:
    """Texts to measure on, and texts to train on."""
    if len(texts) <= config.held_out:
        raise SystemExit(
            f"There are {len(texts)} texts, and held_out={config.held_out} of them are not trained on: raise texts= and "
            f"task.count=, lower held_out=, or give more prompts of prompt_length={config.prompt_length} or more tokens."
        )
    whole, lengths = pad_sequence(texts, True, NO_TOKEN), torch.tensor(firsts)
    parts = slice(config.held_out), slice(config.held_out, None)
    unseen, seen = (Texts(whole[part], lengths[part]) for part in parts)
    return unseen, seen


def known(texts: Texts, config: DictConfig) -> dict[str, Tensor]:
    """The ids of the tokens to draft, the most frequent of what the target wrote, as an option; none for all tokens."""
    if config.drafted is None:
        return {}
    counts = texts.tokens[written(texts)].bincount()
    return {"known": counts.topk(min(config.drafted, len(counts))).indices.sort().values}


def written(texts: Texts) -> Tensor:
    """[n, t] bool: where the target wrote."""
    return (texts.tokens >= 0) & (torch.arange(texts.tokens.shape[1]) >= texts.firsts[:, None])


def weighted(config: DictConfig) -> distillation.Loss:
    """The sum of the losses of the configuration."""
    losses = [(weight, getattr(distillation, name)) for name, weight in config.losses.items()]
    return lambda *laws: sum((weight * loss(*laws) for weight, loss in losses), torch.zeros(()))


@torch.no_grad()
def by_depth(drafter: StatesDrafter, target: PreTrainedModel, features: Features, config: DictConfig) -> dict[str, Any]:
    """1 - TV at each depth, after drafts that were those of the text; everywhere in these texts."""
    some = torch.arange(len(features)).split(config.texts_per_step)
    comparisons = (Comparison(drafter.net, target, features[rows], config.depth) for rows in some)
    return {"accepted by depth": acceptance(comparisons, config.laws_at_once).tolist()}


def measured(drafter: StatesDrafter, setting: Setting, texts: Texts, config: DictConfig) -> dict[str, Any]:
    """On texts not trained on: acceptance by depth, the acceptance length that follows, and those of decoding."""
    target, rule = setting.models.target, instantiate(config.rule)
    found = by_depth(drafter, target, Features(target, drafter.net, *texts), config)
    tree: Any = drafter.tree
    pairs = [(text[text >= 0], int(first)) for text, first in zip(*texts, strict=True)]
    if isinstance(tree, (Static, Widths)):
        spec = drafter.spec(setting.sampling)
        options = {"sampling": setting.sampling, "depth": spec.depth}
        read = (read_along(target, drafter, text, first, **options) for text, first in pairs)
        with suppress(NotForetold):
            steps = [text.starts(tree, rule).sum() for text in read]
            found["expected"] = ratio(written(texts).sum(1).numpy(), np.array(steps))
    for name, sampling in {"served": setting.sampling, "served greedily": Sampling()}.items():
        options = {"sampling": sampling, "max_new_tokens": config.new_tokens, "rule": rule}
        out = specdec.generate(target, [text[:first] for text, first in pairs], drafter, **options)
        tokens = np.array([len(new) for new in out.tokens])
        found[name] = ratio(tokens, tokens / per_prompt([out]))
    return found


def ratio(tokens: np.ndarray, steps: np.ndarray) -> dict[str, Any]:
    """Tokens per step over all texts, its standard error (None for a single text) and its 95 % interval."""
    mean, n = tokens.sum() / steps.sum(), len(tokens)
    error = None if n == 1 else float(np.std(tokens - mean * steps, ddof=1) / n**0.5 / steps.mean())
    low, high = (None if error is None else float(mean + side * 1.96 * error) for side in (-1, 1))
    return {"mean": float(mean), "error": error, "low": low, "high": high, "n": n}


def report(found: dict[str, Any], cost: dict[str, Any]) -> str:
    """The figures, a line each."""
    lines = [f"1 - TV by depth: {' '.join(f'{rate:.3f}' for rate in found['accepted by depth'])}"]
    names = [name for name in ("expected", "served", "served greedily") if name in found]
    lines += [f"acceptance length, {name}: {interval(found[name], digits=3, to=' to ')}" for name in names]
    if "expected" in found and found["served"]["error"] is not None:
        served, expected = found["served"], found["expected"]
        apart = (served["mean"] - expected["mean"]) / math.hypot(served["error"], expected["error"])
        lines[-1:-1] = [f"served less expected: {apart:.1f} standard errors"]
    tflop, minutes = cost["flops"] / 1e12, cost["cpu_seconds"] / 60
    lines.append(f"{cost['steps']} steps, {tflop:.0f} TFLOP, {minutes:.1f} CPU minutes, at most {cost['gb']:.1f} GB")
    return "\n".join(lines)
