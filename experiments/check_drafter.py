"""A published draft on its target: is it read as it was trained, what is accepted, and how fast is it?

    python experiments/check_drafter.py target=hub target.target=NAME drafter.source=NAME_OR_FOLDER

Settings are in `conf/check_drafter.yaml`.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("check_drafter", "check_drafter")

from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.bench.inputs import begin
from experiments.benchmark import with_models
from specdec import Generation
from specdec.drafters import check


def main(config: DictConfig) -> None:
    setting = begin("experiments/check_drafter.py", config)
    methods: dict[str, Any] = with_models(config, setting.models)
    options = {"sampling": setting.sampling, "max_new_tokens": config.new_tokens}
    runs: dict[str, list[Generation]] = {name: [] for name in methods}
    for prompt in tqdm(setting.prompts, desc="prompts", leave=False):
        for name, method in methods.items():  # in turns, so that a slow minute of the machine hits all of them
            runs[name].append(method(setting.models.target, [prompt], **options))
    texts = [torch.cat([ids, run.tokens[0].cpu()]) for ids, run in zip(setting.prompts, runs["chosen"], strict=True)]
    readings = check(setting.models.target, methods["chosen"].keywords["drafter"], texts, config.depth)
    speeds = {name: torch.tensor([run.summary()["tokens_per_second"] for run in of]) for name, of in runs.items()}
    found = {
        "acceptance_length": sum(run.summary()["acceptance_length"] for run in runs["chosen"]) / len(texts),
        "speed_up": float((speeds["chosen"] / speeds["autoregressive"]).median()),
        "take": readings.best.name,
    }
    print(f"{readings}\n\n{len(texts)} texts, {config.new_tokens} new tokens each, as the draft is read now:")
    print("acceptance length {acceptance_length:.2f}, speed-up over no draft {speed_up:.2f}".format(**found))
    print(setting.log.write({**setting.source, **found, "readings": str(readings).splitlines()}))
