"""Decoding methods compared on the same prompts, interleaved, in one table.

    python experiments/benchmark.py sampling=temperature sampling.temperature=0.8 batch=8

Settings and their defaults are in `conf/benchmark.yaml`; --help lists the choices of every group. Speed-ups are over the
first method. Ctrl-C ends early with the table of the rounds that are complete.
"""

from __future__ import annotations

from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, flag_override

from experiments import calls
from experiments.inputs import begin
from experiments.measure import against_ceilings, rounds, uninterrupted
from experiments.report import figures, speed, table


@hydra.main(config_path="../conf", config_name="benchmark", version_base="1.3")
def main(config: DictConfig) -> None:
    models, ids, sampling, log, source = begin("experiments/benchmark.py", config)
    methods = with_models(config, models)
    batches = [ids[i : i + config.batch] for i in range(0, len(ids), config.batch)]
    settings = {"sampling": sampling, "max_new_tokens": config.new_tokens}
    finished = uninterrupted(rounds(models.target, methods, batches, repeats=config.repeats, **settings))
    whole = config.ceilings and len(finished) == config.repeats
    found = figures(finished, against_ceilings(models.target, methods, batches, **settings) if whole else None)
    print(f"{title(config)}: {len(ids)} prompts x {config.new_tokens} tokens x {len(finished)} rounds\n")
    print(table(found), end="\n\n")
    runs = {name: speed([done[name] for done in finished]).tolist() for name in found}
    result = {"prompts": len(ids), "rounds": len(finished), "figures": found, "tokens_per_second": runs}
    print(log.write({**source, **result}))


def with_models(config: DictConfig, models: Any) -> dict[str, Any]:
    """The methods by name, with what is loaded once for all of them in place of `${models.draft}` and `${models.heads}`."""
    loaded = {"draft": models.draft, "heads": models.heads}
    for name, module in loaded.items():
        if module is not None:
            module.to(config.device)
        elif f"${{models.{name}}}" in str(OmegaConf.to_container(config)):
            raise SystemExit(
                f"target.{name} is not set, and a method drafts with it: name one, or leave the method out."
            )
    models.target.to(config.device)
    with flag_override(config, ["struct", "allow_objects"], [False, True]):
        config.models = loaded
        return dict(instantiate(config.methods))


def title(config: DictConfig) -> str:
    """The conditions under which the figures hold."""
    fields = {key: value for key, value in config.sampling.items() if key != "_target_" and value is not None}
    law = ", ".join(f"{key} {value}" for key, value in fields.items())
    where = f"{config.dtype} on {config.device}, {config.threads} CPU thread{'s' * (config.threads > 1)}"
    choice = HydraConfig.get().runtime.choices["target"]
    return f"{config.target.get('target', f'{choice} pair')}, {where}, batch {config.batch}, {law}"


if __name__ == "__main__":
    calls.run(main)
