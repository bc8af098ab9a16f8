"""Decoding methods compared on the same prompts, interleaved, in one table; or a sweep of such comparisons.

    python experiments/benchmark.py drafter=medusa tree=dynamic sampling=temperature batch=8
    python experiments/benchmark.py -m drafter=model,medusa,ngram tree=chain,dynamic sampling.temperature=0,1

Settings and their defaults are in `conf/benchmark.yaml`; --help lists the choices of every group. Speed-ups are over the
first method. Ctrl-C ends early with the table of the rounds that are complete. A sweep goes on where it was stopped: see
`experiments/bench/sweep.py`.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("benchmark", "benchmark")

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, flag_override

from experiments.bench import sweep
from experiments.bench.inputs import begin, in_batches
from experiments.bench.measure import Refused, Round, against_ceilings, recorded, rounds, uninterrupted
from experiments.bench.progress import settings
from experiments.bench.report import figures, over, speed, table
from experiments.bench.results import Wandb
from experiments.bench.terminal import fitted
from experiments.peer_methods.libraries import present
from specdec.tuning import reading
from specdec.tuning.roofline import parameters


def main(config: DictConfig) -> str | None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.job(config, compare)
    log, result = compare(config, uninterrupted)
    counts = f"{result['prompts']} prompts x {config.new_tokens} tokens x {result['rounds']} rounds"
    found = table(result["figures"], result["over"], result["absent"])
    print(fitted("\n\n".join([f"{title(config)}: {counts}", found, *result["notes"]])), end="\n\n")
    print(log.write(result))


def compare(config: DictConfig, gather: Callable[[Iterator[Round]], list[Round]]) -> tuple[Any, dict[str, Any]]:
    """The log, and what to write there."""
    setting = begin("experiments/benchmark.py", config)
    target, ids, log = setting.models.target, setting.prompts, setting.log
    methods, absent = present(with_models(config, setting.models))
    if (first := next(iter(config.methods))) in absent:
        raise Refused(f"{first}: {absent[first]}. Speed-ups are over it: let another method be the first.")
    batches, of, later = map(list, zip(*in_batches(ids, setting.turns, config.batch), strict=True))
    settings = {"sampling": setting.sampling, "max_new_tokens": config.new_tokens}
    repeats = config.uncounted + config.repeats
    complete = rounds(target, methods, batches, repeats=repeats, later=later, **settings)
    finished = gather(islice(complete, config.uncounted, None))
    whole = config.ceilings and len(finished) == config.repeats
    ceilings = against_ceilings(target, methods, batches, **settings) if whole else None
    if isinstance(log, Wandb):
        tokenizer = setting.models.tokenizer
        log.runs.update(recorded(target, methods, ids[0], sampling=setting.sampling, tokenizer=tokenizer))
    found = figures(finished, ceilings, of if max(map(of.count, of)) > 1 else None)
    runs = {name: speed([done[name] for done in finished]).tolist() for name in found}
    read = reading.least(parameters(target)) if config.device == "cpu" else None
    counts = {"prompts": len(ids), "rounds": len(finished), "notes": notes(config, read), "reading_the_weights": read}
    compared = {"over": {peer: over(finished, peer) for peer in config.over if peer in methods}, "absent": absent}
    return log, {**setting.source, **counts, "figures": found, **compared, "tokens_per_second": runs}


def with_models(config: DictConfig, models: Any) -> dict[str, Any]:
    """The methods by name, with what is loaded once for all of them in place of `${models.draft}` and the like."""
    loaded = {"target": models.target, "draft": models.draft, "heads": models.heads}
    for name, module in loaded.items():
        if module is not None and name != "target":  # which is there already, or over several devices
            module.to(config.device)
        if module is None and f"${{models.{name}}}" in sweep.used(config):
            raise SystemExit(
                f"target.{name} is not set, and a method drafts with it: name one, or leave the method out."
            )
    whole = copy.deepcopy(config)  # hydra resolves in place
    with flag_override(whole, ["struct", "allow_objects"], [False, True]):
        whole.models = loaded
        try:
            return dict(instantiate(whole.methods))
        except InstantiationException as error:
            if isinstance(error.__cause__, ValueError):
                raise Refused(str(error.__cause__)) from error
            raise


def notes(config: DictConfig, read: dict[str, Any] | None) -> list[str]:
    """The floor of a step, and what was asked for and is no part of what was measured."""
    floor = (
        [f"Reading the target's weights once takes {read['milliseconds']:.1f} ms (by {read['way']})."] if read else []
    )
    drafter, without = HydraConfig.get().runtime.choices["drafter"], sweep.unused(config)
    return floor + [
        f"{key}={value} changes nothing: no method takes a {key.partition('.')[0]} (drafter={drafter}, methods="
        f"[{','.join(config.methods)}])."
        for key, value in settings(HydraConfig.get().overrides.task)
        if key.partition(".")[0] in without
    ]


def title(config: DictConfig) -> str:
    """The conditions under which the figures hold."""
    fields = {key: value for key, value in config.sampling.items() if key != "_target_" and value is not None}
    law = ", ".join(f"{key} {value}" for key, value in fields.items())
    stored = f" stored as {config.weights}" if config.weights else ""
    where = f"{config.dtype}{stored} on {config.device}, {config.threads} CPU thread{'s' * (config.threads > 1)}"
    choices = HydraConfig.get().runtime.choices
    parts = ", ".join(f"{part} {choices[part]}" for part in sweep.PARTS if part not in sweep.unused(config))
    model = config.target.get("target", choices["target"])
    return f"{model}, {where}, batch {config.batch}, {law}; {parts}"
