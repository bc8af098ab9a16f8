"""How well the cost model of `specdec.theory` predicts speed-ups: calibrate, predict, measure, one table.

    python experiments/predict.py sampling=temperature threads=1 repeats=3

Takes the settings of `experiments/benchmark.py`, of which it does not use `methods` and `rule`. Every second prompt is for
calibration (how often each child is accepted, and what forward passes cost), the others are decoded and timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from tqdm import tqdm

import specdec
from experiments import calls
from experiments.inputs import begin
from experiments.measure import rounds, uninterrupted
from experiments.report import figures, floor, interval, markdown
from specdec.drafters import Drafter, ModelDrafter
from specdec.theory import Costs, expected_length, measure_costs, positional_acceptance, predicted_speed_up
from specdec.trace import Trace
from specdec.trees import Widths

SHAPES = [(1,), (1,) * 2, (1,) * 4, (1,) * 6, (3,), (2, 2), (4, 2, 1), (2, 2, 2, 1)]
HEADER = ["tree", "nodes", "acceptance length: predicted", "measured", "speed-up: predicted", "measured (95 % CI)",
          "error", "loop's own time"]  # fmt: skip


@hydra.main(config_path="../conf", config_name="benchmark", version_base="1.3")
def main(config: DictConfig) -> None:
    models, ids, _, sampling, log, source = begin("experiments/predict.py", config)
    if models.draft is None:
        raise SystemExit("target.draft is not set: name the draft model whose speed-up is to be predicted.")
    target, draft = models.target.to(config.device), models.draft.to(config.device)
    settings = {"sampling": sampling, "max_new_tokens": config.new_tokens}
    trees = {"-".join(map(str, shape)): Widths(shape) for shape in SHAPES}
    drafters = {name: ModelDrafter(draft, tree) for name, tree in trees.items()}
    context = sum(map(len, ids)) // len(ids) + config.new_tokens // 2
    costs = measure_costs(target, draft, context=context, batch=config.batch)
    predicted = {
        name: predict(calibrate(target, drafters[name], ids[::2], settings), tree, costs)
        for name, tree in trees.items()
    }
    methods = {"none": specdec.generate, **{name: partial(specdec.generate, drafter=d) for name, d in drafters.items()}}
    batches = [ids[1::2][i : i + config.batch] for i in range(0, len(ids[1::2]), config.batch)]
    finished = uninterrupted(rounds(target, methods, batches, repeats=config.repeats, **settings))
    measured = figures(finished)
    print(table(predicted, measured), floor(measured), sep="\n\n", end="\n\n")
    curves = {"verify": vars(costs.verify), "draft": vars(costs.draft)}
    found = {"prompts": len(ids), "rounds": len(finished), "costs": curves, "predicted": predicted, "figures": measured}
    print(log.write({**source, **found}))


def calibrate(
    target: Any, drafter: Drafter, prompts: list[torch.Tensor], settings: dict[str, Any]
) -> list[list[float]]:
    """Acceptance by depth and slot, on prompts that are not timed."""
    bar = tqdm(prompts, desc="calibrating", leave=False)
    traces = [specdec.generate(target, prompt, drafter, trace="ceiling", **settings).trace for prompt in bar]
    return positional_acceptance(Trace(steps=[step for trace in traces for step in trace.steps]))


def predict(acceptance: list[list[float]], tree: Widths, costs: Costs) -> dict[str, Any]:
    """Acceptance length and speed-up of a tree of fixed widths."""
    parents = parents_of(tree.widths)
    length = expected_length(parents, acceptance)
    speed_up = predicted_speed_up(length, parents, costs)
    return {"nodes": len(parents), "acceptance": acceptance, "acceptance_length": length, "speed_up": speed_up}


def parents_of(widths: Sequence[int]) -> list[int]:
    """The parents of the tree in which every node at depth d has widths[d] children."""
    levels = [1, *accumulate(widths, lambda a, b: a * b)]
    starts = [0, *accumulate(levels)]
    return [-1, *(starts[d] + i // width for d, width in enumerate(widths) for i in range(levels[d] * width))]


def table(predicted: dict[str, dict], measured: dict[str, dict]) -> str:
    """Predicted and measured, as a markdown table; the error is that of the predicted speed-up, relative to the measured."""
    rows = [HEADER]
    for name, guess in predicted.items():
        found = measured[name]
        speed = found["speed_up"]
        lengths = [f"{row['acceptance_length']:.2f}" for row in (guess, found)]
        error = guess["speed_up"] / speed["median"] - 1
        rows.append([name, str(guess["nodes"]), *lengths, f"{guess['speed_up']:.2f}", interval(speed, digits=2),
                     f"{error:+.0%}", f"{found['loop_share']:.0%}"])  # fmt: skip
    return markdown(rows)


if __name__ == "__main__":
    calls.run(main)
