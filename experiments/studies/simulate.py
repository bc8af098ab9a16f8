"""What runs of other trees and rules would give, from recorded texts and measured times; and what they do give.

    python -m experiments.studies.simulate sampling=temperature task.per_task=2 new_tokens=48

Takes the settings of `experiments/benchmark.py`, of which it does not use `methods` and `rule`. The target writes a few texts
alone, and `specdec.prediction` says where the steps of any tree and rule would begin in them; what a step costs is measured on
other trees. All settings are simulated from these, and then decoded and timed on the same prompts: none was run before. To find
the best of all settings, use `specdec.tune`; this says how far what is foretold is off.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("studies.simulate", "benchmark")

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

import specdec
from experiments.bench.inputs import begin
from experiments.bench.measure import Round, rounds, uninterrupted
from experiments.bench.report import figures, floor, interval, markdown, median
from specdec import rules
from specdec.drafters import ModelDrafter
from specdec.prediction import texts
from specdec.theory import CostCurve, Costs
from specdec.trees import Widths

SHAPES = [(1,), (1,) * 2, (1,) * 4, (1,) * 6, (3,), (2, 2), (4, 2, 1), (2, 2, 2, 1)]
OTHERS = [((1,) * 4, "BlockVerification"), ((2, 2), "TraversalVerification"), ((4, 2, 1), "TraversalVerification")]
TIMED = [(2,), (1,) * 5, (3, 3), (3, 3, 2)]  # shapes that tell what a step costs
TEXTS, SEED = 16, 1000  # texts per prompt, and their seed: the runs that are timed have others
HEADER = ["tree", "rule", "nodes", "acceptance length: simulated", "measured", "error (standard error)",
          "speed-up: simulated", "measured (95 % CI)", "error"]  # fmt: skip


def main(config: DictConfig) -> None:
    setting = begin("experiments/studies/simulate.py", config)
    models, ids = setting.models, setting.prompts
    target, draft = models.target, setting.draft
    settings = {"sampling": setting.sampling, "max_new_tokens": config.new_tokens}
    runs = {label(*case): case for case in [*((shape, "SiblingRejection") for shape in SHAPES), *OTHERS]}
    began = time.perf_counter()
    costs = {
        rule: calibrate(target, draft, ids, settings, rule) for rule in dict.fromkeys(rule for _, rule in runs.values())
    }
    calibrated = time.perf_counter()
    simulated = simulate(target, draft, ids, settings, runs, costs)
    took = {"calibrating": calibrated - began, "recording and simulating": time.perf_counter() - calibrated}
    methods = {"none": specdec.generate} | {name: method(draft, *case) for name, case in runs.items()}
    finished = uninterrupted(rounds(target, methods, [[p] for p in ids], repeats=config.repeats, **settings))
    measured = figures(finished)
    lines = compare(simulated, measured, finished)
    print(table(runs, simulated, measured, lines), floor(measured), sep="\n\n", end="\n\n")
    curves = {rule: {"rest": vars(found.verify), "draft": vars(found.draft)} for rule, found in costs.items()}
    found = {"prompts": len(ids), "rounds": len(finished), "seconds": took, "costs": curves, "simulated": simulated}
    errors = {key: max((line[key] for line in lines.values()), key=abs) for key in ("acceptance_length", "speed_up")}
    print("largest errors: acceptance length {acceptance_length:+.1%}, speed-up {speed_up:+.1%}".format(**errors))
    print(setting.log.write({**setting.source, **found, "figures": measured, "errors": lines}))


def label(shape: Sequence[int], rule: str) -> str:
    """`4-2-1`, and the rule if it is not sibling rejection."""
    return "-".join(map(str, shape)) + ("" if rule == "SiblingRejection" else f" {rule}")


def method(draft: Any, shape: Sequence[int], rule: str) -> Callable[..., specdec.Generation]:
    """`specdec.generate` with this tree and rule."""
    return partial(specdec.generate, drafter=ModelDrafter(draft, Widths(shape)), rule=getattr(rules, rule)())


def calibrate(
    target: Any, draft: Any, prompts: list[torch.Tensor], settings: dict[str, Any], rule: str = "SiblingRejection"
) -> Costs:
    """What a step costs under this rule by its tree, in steps without a draft, from runs of a few other trees.

    Times are means over the steps of a run, over that of a run without a draft just before; of these the medians over prompts.
    `draft` is the straight line in the nodes of a level that fits drafting, `verify` all the rest.
    """
    shapes = [shape for shape in TIMED if max(shape) == 1 or rule != "BlockVerification"]
    if (deepest := max(map(len, shapes))) >= settings["max_new_tokens"]:
        raise SystemExit(
            f"new_tokens={settings['max_new_tokens']}: trees {deepest} deep are timed; ask for {deepest + 1} or more."
        )
    times = []  # [prompt][shape]: of drafting, and of the whole step
    for prompt in tqdm(prompts, desc="calibrating", leave=False):
        alone = step_seconds(specdec.generate(target, prompt, **settings), 1)[1]
        made = [(method(draft, shape, rule)(target, prompt, **settings), nodes(shape)) for shape in shapes]
        times.append([step_seconds(*run) / alone for run in made])
    drafting, whole = np.median(times, axis=0).T
    # drafting: once a step, once a level, and once a node that the draft reads; of these the first belongs to the rest
    parts = np.array([[1, len(shape), nodes(shape[:-1])] for shape in shapes])
    line = np.linalg.lstsq(parts, drafting)[0] * [0, 1, 1]
    most = max(map(nodes, shapes))
    rest = CostCurve((1, *map(nodes, shapes)), (1.0, *(whole - parts @ line).tolist()))
    return Costs(rest, CostCurve((1, most), (line @ [[0, 0], [1, 1], [1, most]]).tolist()))


def step_seconds(out: specdec.Generation, size: int) -> np.ndarray:
    """Mean seconds of drafting, and of all, of the steps with trees of this size: at the end they are smaller."""
    steps = [step for step in out.trace.steps if step.nodes == size]
    parts = np.array([[step.draft_seconds, step.verify_seconds + step.other_seconds] for step in steps]).mean(0)
    return np.array([parts[0], parts.sum()])


def simulate(
    target: Any,
    draft: Any,
    prompts: list[torch.Tensor],
    settings: dict[str, Any],
    runs: dict[str, tuple[Sequence[int], str]],
    costs: dict[str, Costs],
) -> dict[str, Any]:
    """Acceptance length and speed-up of every run, as `figures` defines them: pooled; the median over prompts."""
    count = TEXTS if settings["sampling"].temperature > 0 else 1
    recorded = [
        texts(target, ModelDrafter(draft), prompt, count, seed=SEED, **settings)
        for prompt in tqdm(prompts, desc="recording", leave=False)
    ]
    tokens = np.array([[len(text.tokens) for text in own] for own in recorded]).T  # [text, prompt]
    found = {}
    for name, (shape, rule) in tqdm(runs.items(), desc="simulating", leave=False):
        left = range(settings["max_new_tokens"], 0, -1)
        step = np.array([costs[rule].step(parents_of(shape[: n - 1])) for n in left])  # as deep as is of use
        starts = [[text.starts(Widths(shape), getattr(rules, rule)()) for text in own] for own in recorded]
        steps = np.array([[begun.sum() for begun in own] for own in starts]).T
        took = np.array([[begun @ step[: len(begun)] for begun in own] for own in starts]).T
        length, error = pooled(tokens, steps)
        found[name] = {"nodes": nodes(shape), "acceptance_length": length, "standard_error": error}
        found[name]["speed_up"] = median(tokens / took)
    return found


def pooled(tokens: np.ndarray, steps: np.ndarray) -> tuple[float, float | None]:
    """Tokens per step of runs [run, prompt], and its standard error: by chance, for these prompts; None if run once."""
    length = tokens.sum() / steps.sum()
    if len(tokens) == 1:
        return float(length), None
    beyond = (tokens - length * steps).var(0, ddof=1).sum() * len(tokens)
    return float(length), float(beyond**0.5 / steps.sum())


def parents_of(widths: Sequence[int]) -> list[int]:
    """The parents of the tree in which every node at depth d has widths[d] children."""
    levels = [1, *accumulate(widths, lambda a, b: a * b)]
    starts = [0, *accumulate(levels)]
    return [-1, *(starts[d] + i // width for d, width in enumerate(widths) for i in range(levels[d] * width))]


def nodes(widths: Sequence[int]) -> int:
    """Of such a tree, the root included."""
    return len(parents_of(widths))


def compare(simulated: dict[str, dict], measured: dict[str, dict], finished: list[Round]) -> dict[str, dict[str, Any]]:
    """Relative errors of what was simulated, and what chance has in those of acceptance lengths: their standard error."""
    errors = {}
    for name, guess in simulated.items():
        traces = [[run.trace for run in done[name]] for done in finished]
        tokens = np.array([[sum(sum(step.emitted) for step in trace.steps) for trace in row] for row in traces])
        length, error = pooled(tokens, np.array([[len(trace.steps) for trace in row] for row in traces]))
        texts_error = guess["standard_error"]
        errors[name] = {
            "acceptance_length": guess["acceptance_length"] / length - 1,
            "standard_error": None
            if texts_error is None or error is None
            else float(np.hypot(texts_error, error) / length),
            "speed_up": guess["speed_up"]["median"] / measured[name]["speed_up"]["median"] - 1,
        }
    return errors


def table(runs: dict[str, Any], simulated: dict[str, dict], measured: dict[str, dict], errors: dict[str, dict]) -> str:
    """Simulated and measured, as a markdown table."""
    rows = [HEADER]
    for name, guess in simulated.items():
        (shape, rule), found, error = runs[name], measured[name], errors[name]
        lengths = [f"{row['acceptance_length']:.2f}" for row in (guess, found)]
        cells = [label(shape, "SiblingRejection"), rule, str(guess["nodes"]), *lengths]
        chance = "" if error["standard_error"] is None else f" ({error['standard_error']:.1%})"
        cells += [f"{error['acceptance_length']:+.1%}{chance}", f"{guess['speed_up']['median']:.2f}"]
        rows.append([*cells, interval(found["speed_up"], digits=2), f"{error['speed_up']:+.1%}"])
    return markdown(rows)
