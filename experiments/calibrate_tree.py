"""The fastest static tree for a pair of models on this machine, as an option for conf/tree.

    python experiments/calibrate_tree.py nodes=24 sampling=temperature law=WITHOUT_REPLACEMENT
    python experiments/benchmark.py --config-dir outputs tree=calibrated

How often each child is accepted is recorded on calibration prompts, forward passes are timed, and `specdec.theory.best_tree`
finds the shape: Sequoia's program (arXiv:2402.12374) with measured times. Settings are in `conf/calibrate_tree.yaml`.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("calibrate_tree", "calibrate_tree")

from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from tqdm import tqdm

import specdec
from experiments.bench.inputs import begin
from experiments.bench.results import whole
from specdec import Law
from specdec.drafters import Drafter, ModelDrafter
from specdec.theory import (
    best_tree,
    expected_length,
    longest_tree,
    measure_costs,
    predicted_speed_up,
)
from specdec.trace import Trace, positional_acceptance
from specdec.trees import Widths

LAWS = ("POINT", "IID", "WITHOUT_REPLACEMENT")  # of which a child's acceptance does not depend on later siblings


def main(config: DictConfig) -> None:
    if config.law not in LAWS:
        raise SystemExit(f"law={config.law}: shapes can be compared under {', '.join(LAWS)}.")
    setting = begin("experiments/calibrate_tree.py", config)
    models, prompts = setting.models, setting.prompts
    target, draft = models.target, setting.draft
    drafter = ModelDrafter(draft, Widths(config.recorded, Law[config.law]))
    options = {"sampling": setting.sampling, "max_new_tokens": config.new_tokens}
    acceptance = calibrate(target, drafter, prompts, options)
    context = sum(map(len, prompts)) // len(prompts) + config.new_tokens // 2
    costs = measure_costs(
        target, draft, nodes=sizes(config.nodes), context=context, batch=config.batch, repeats=config.repeats
    )
    parents = best_tree(acceptance, costs, config.nodes) if config.fastest else longest_tree(acceptance, config.nodes)
    length = expected_length(parents, acceptance)
    found = {"parents": parents, "acceptance_length": length, "speed_up": predicted_speed_up(length, parents, costs)}
    curves = {"verify": vars(costs.verify), "draft": vars(costs.draft)}
    measured = {"prompts": len(prompts), "acceptance": acceptance, "costs": curves}
    print(setting.log.write({**setting.source, **measured, "predicted": found}))
    if len(parents) == 1:
        raise SystemExit("No tree is predicted to be faster than decoding without a draft, so none is written.")
    print("{parents}: predicted acceptance length {acceptance_length:.2f}, speed-up {speed_up:.2f}".format(**found))
    with whole(config.output) as file:
        file.write_text(option(parents, config.law, setting.source, found), "utf-8")
    print(config.output)


def calibrate(
    target: Any, drafter: Drafter, prompts: list[torch.Tensor], settings: dict[str, Any]
) -> list[list[float]]:
    """Acceptance by depth and slot."""
    bar = tqdm(prompts, desc="calibrating", leave=False)
    traces = [specdec.generate(target, prompt, drafter, trace="ceiling", **settings).trace for prompt in bar]
    return positional_acceptance(Trace(steps=[step for trace in traces for step in trace.steps]))


def sizes(nodes: int) -> list[int]:
    """1, 2, 4, ... and `nodes`: the sizes that are timed."""
    return [*(2**i for i in range((nodes - 1).bit_length())), nodes]


def option(parents: list[int], law: str, source: dict[str, Any], found: dict[str, Any]) -> str:
    """The file: one constructor call, under comments that say where it comes from."""
    made = {key: source[key] for key in ("command", "commit", "dirty", "versions", "cpu", "gpu", "date")}
    made["predicted"] = {key: round(found[key], 3) for key in ("acceptance_length", "speed_up")}
    comments = "".join(f"# {line}\n" for line in yaml.safe_dump(made, sort_keys=False, width=1000).splitlines())
    choice = {"_target_": "hydra.utils.get_object", "path": f"specdec.Law.{law}"}
    call = {"_target_": "specdec.trees.Static", "parents": parents, "law": choice}
    return comments + yaml.safe_dump(call, sort_keys=False, default_flow_style=None, width=1000)
