"""What runs of other trees and rules would give, from recorded texts and measured times; and what they do give.

    python experiments/simulate.py sampling=temperature task.per_task=2 new_tokens=48

Takes the settings of `experiments/benchmark.py`, of which it does not use `methods` and `rule`. A few texts are recorded, with
the laws at all nodes of the largest tree at every place. All settings are simulated from them and from the times of forward
passes, and then decoded and timed on the same prompts: none of them was run before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, zip_longest
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

import specdec
from experiments import calls
from experiments.inputs import begin
from experiments.measure import rounds, uninterrupted
from experiments.report import figures, median
from specdec import rules
from specdec.drafters import ModelDrafter
from specdec.record import Packed, Record
from specdec.rules import Decision, Rule
from specdec.theory import CostCurve, Costs, measure_costs, predicted_speed_up
from specdec.trace import Trace, replay
from specdec.tree import DraftTree, Law, RowTree, Topology
from specdec.trees import Widths

SHAPES = [(1,), (1,) * 2, (1,) * 4, (1,) * 6, (3,), (2, 2), (4, 2, 1), (2, 2, 2, 1)]
OTHERS = [((1,) * 4, "BlockVerification"), ((2, 2), "TraversalVerification"), ((4, 2, 1), "TraversalVerification")]
TIMED = [(), (2,), (3, 3, 2)]  # shapes on which the loop's own time is measured
SEEDS = range(1000, 1002)  # of the recorded texts; the runs that are timed have others
HEADER = ["tree", "rule", "nodes", "acceptance length: simulated", "measured", "error", "speed-up: simulated",
          "measured (95 % CI)", "error"]  # fmt: skip


class Scout(Rule):
    """Takes one token of the target's at a time, whatever was drafted: every place in the text gets a step."""

    lossless = True

    def decide(self, tree, target_law, coins):
        return Decision([0], coins.pick(0, target_law.probs(0)))


@hydra.main(config_path="../conf", config_name="benchmark", version_base="1.3")
def main(config: DictConfig) -> None:
    models, ids, sampling, log, source = begin("experiments/simulate.py", config)
    if models.draft is None:
        raise SystemExit("target.draft is not set: name the draft model whose speed-up is to be predicted.")
    target, draft = models.target.to(config.device), models.draft.to(config.device)
    settings = {"sampling": sampling, "max_new_tokens": config.new_tokens}
    cases: set[tuple[tuple[int, ...], str]] = {(shape, "SiblingRejection") for shape in SHAPES} | set(OTHERS)
    runs = {
        label(*case): case for case in sorted(cases, key=lambda case: (case[1] != "SiblingRejection", nodes(case[0])))
    }
    began = time.perf_counter()
    costs = calibrate(target, draft, ids, settings)
    calibrated = time.perf_counter()
    simulated = simulate(target, draft, ids, settings, runs, costs)
    took = {"calibrating": calibrated - began, "recording and simulating": time.perf_counter() - calibrated}
    methods = {"none": specdec.generate} | {
        name: partial(specdec.generate, drafter=ModelDrafter(draft, Widths(shape)), rule=getattr(rules, rule)())
        for name, (shape, rule) in runs.items()
    }
    finished = uninterrupted(rounds(target, methods, [[p] for p in ids], repeats=config.repeats, **settings))
    measured = figures(finished)
    lines = compare(simulated, measured)
    print(table(runs, simulated, measured, lines), end="\n\n")
    curves = {name: vars(curve) for name, curve in vars(costs).items()}
    found = {"prompts": len(ids), "rounds": len(finished), "seconds": took, "costs": curves, "simulated": simulated}
    errors = {key: max((line[key] for line in lines.values()), key=abs) for key in ("acceptance_length", "speed_up")}
    print("largest errors: acceptance length {acceptance_length:+.1%}, speed-up {speed_up:+.1%}".format(**errors))
    print(log.write({**source, **found, "figures": measured, "errors": lines}))


def label(shape: Sequence[int], rule: str) -> str:
    """`4-2-1`, and the rule if it is not sibling rejection."""
    return "-".join(map(str, shape)) + ("" if rule == "SiblingRejection" else f" {rule}")


def calibrate(target: Any, draft: Any, prompts: list[torch.Tensor], settings: dict[str, Any]) -> Costs:
    """Times of forward passes, and the loop's own in runs of a few shapes that are not simulated."""
    context = sum(map(len, prompts)) // len(prompts) + settings["max_new_tokens"] // 2
    costs = measure_costs(target, draft, context=context)
    own: list[list[float]] = [[] for _ in TIMED]
    drafters = [ModelDrafter(draft, Widths(shape)) if shape else None for shape in TIMED]
    for prompt in prompts[:4]:
        for times, drafter in zip(own, drafters, strict=True):
            steps = specdec.generate(target, prompt, drafter, **settings).trace.steps
            times += [step.other_seconds for step in steps]
    sizes = [nodes(shape) for shape in TIMED]
    return replace(costs, other=CostCurve(tuple(sizes), tuple(float(np.median(times)) for times in own)))


def simulate(
    target: Any, draft: Any, prompts: list[torch.Tensor], settings: dict[str, Any], runs: dict[str, Any], costs: Costs
) -> dict[str, Any]:
    """Acceptance length and speed-up of every run, as `figures` defines them: pooled; the median over prompts."""
    everything = Widths([max(level) for level in zip_longest(*(shape for shape, _ in runs.values()), fillvalue=1)])
    counts: dict[str, list[list[list[int]]]] = {name: [] for name in runs}  # [prompt][seed][step]
    for prompt in tqdm(prompts, desc="simulating", leave=False):
        options = {"drafter": ModelDrafter(draft, everything), "rule": Scout(), "trace": "laws", **settings}
        texts = [(seed, specdec.generate(target, prompt, seed=seed, **options).trace) for seed in SEEDS]
        for name, (shape, rule) in runs.items():
            counts[name].append([walk(trace, shape, getattr(rules, rule)(), seed) for seed, trace in texts])
    found = {}
    for name, (shape, _) in runs.items():
        lengths = np.array([[np.mean(steps) for steps in seeds] for seeds in counts[name]])
        steps = [count for seeds in counts[name] for walked in seeds for count in walked]
        speed = predicted_speed_up(1.0, parents_of(shape), costs)
        found[name] = {
            "nodes": nodes(shape),
            "acceptance_length": float(np.mean(steps)),
            "speed_up": median(speed * lengths.T),
        }
    return found


def walk(trace: Trace, shape: Sequence[int], rule: Rule, seed: int) -> list[int]:
    """Tokens per step of a run through the recorded text, in which each step begins where the one before ended.

    Greedy, that is the run. Sampled, each step is one that the run could make at that place; it goes on with the recorded
    text instead of the one that it would have emitted.
    """
    steps, counts, place = trace.steps, [], 0
    random = np.random.default_rng(seed)
    while place < len(steps):
        step = steps[place]
        assert step.record is not None
        record = replace(narrowed(step.record, shape, random), seed=seed)
        [again] = replay(Trace(steps=[replace(step, record=record)]), rule).steps
        counts.append(again.emitted[0])
        place += counts[-1]
    return counts


def narrowed(record: Record, widths: Sequence[int], random: np.random.Generator) -> Record:
    """A record of one row as `Widths(widths)` would have drafted it, drawn from that of a tree nowhere narrower.

    The first children of a node are as good as any others of theirs. Only SAMPLED_THEN_TOP has to be drawn anew, because
    its first child comes from outside the top: among the top that are too many now, by their draft probabilities, and
    the recorded first child, which was drawn from all the others.
    """
    drafted, probs = record.tree().row(0, record.coins().row(0)), record.tree().draft_probs
    old, parents, laws, depths = [0], [-1], [Law.POINT], [0]  # of the new nodes, level by level
    new = 0
    while new < len(old) and depths[new] < len(widths):
        children, laws[new] = _children(drafted, old[new], widths[depths[new]], random)
        old += children
        parents += [new] * len(children)
        laws += [Law.POINT] * len(children)
        depths += [depths[new] + 1] * len(children)
        new += 1
    topology = Topology(torch.tensor([parents]), depths[-1])
    bare = DraftTree(record.bare.tokens[:, old], topology, torch.tensor([laws], dtype=torch.uint8))
    inner = [node for node, depth in zip(old, depths, strict=True) if depth < depths[-1]]
    return replace(
        record,
        spec=replace(record.spec, nodes=len(old), depth=len(widths), width=max(widths)),
        bare=bare,
        draft=None if probs is None or not inner else Packed.of(probs[:, inner]),
        target=Packed.of(record.target.tensor()[:, old]),
    )


def _children(tree: RowTree, node: int, width: int, random: np.random.Generator) -> tuple[list[int], Law]:
    """At most `width` of a node's children, and their law."""
    children, law, probs = tree.children(node), Law(tree.laws[node]), tree.tree.draft_probs
    if probs is None or not children or law in (Law.IID, Law.WITHOUT_REPLACEMENT):
        return children[:width], law
    first = children[:1] if law == Law.SAMPLED_THEN_TOP else []
    top = children[len(first) :]
    kept, spare = top[: width - 1], top[width - 1 :]
    q = probs[0, node].double().numpy().copy()
    weights = q[[tree.tokens[child] for child in spare]].tolist()
    q[[tree.tokens[child] for child in top]] = 0
    weights += [q.sum()] * len(first)
    if not sum(weights) > 0:
        return kept, Law.POINT  # they are all that can be drawn
    place = random.choice(len(weights), p=np.array(weights) / sum(weights))
    return [[*spare, *first][place], *kept], Law.SAMPLED_THEN_TOP


def parents_of(widths: Sequence[int]) -> list[int]:
    """The parents of the tree in which every node at depth d has widths[d] children."""
    levels = [1, *accumulate(widths, lambda a, b: a * b)]
    starts = [0, *accumulate(levels)]
    return [-1, *(starts[d] + i // width for d, width in enumerate(widths) for i in range(levels[d] * width))]


def nodes(widths: Sequence[int]) -> int:
    """Of such a tree, the root included."""
    return len(parents_of(widths))


def compare(simulated: dict[str, dict], measured: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Relative errors of what was simulated."""
    return {
        name: {
            "acceptance_length": guess["acceptance_length"] / measured[name]["acceptance_length"] - 1,
            "speed_up": guess["speed_up"]["median"] / measured[name]["speed_up"]["median"] - 1,
        }
        for name, guess in simulated.items()
    }


def table(runs: dict[str, Any], simulated: dict[str, dict], measured: dict[str, dict], errors: dict[str, dict]) -> str:
    """Simulated and measured, as a markdown table."""
    rows = [HEADER, ["---"] * len(HEADER)]
    for name, guess in simulated.items():
        (shape, rule), found, error = runs[name], measured[name], errors[name]
        speed = found["speed_up"]
        interval = "" if speed["n"] == 1 else f" ({speed['low']:.2f}-{speed['high']:.2f})"
        lengths = [f"{row['acceptance_length']:.2f}" for row in (guess, found)]
        cells = [label(shape, "SiblingRejection"), rule, str(guess["nodes"]), *lengths]
        cells += [f"{error['acceptance_length']:+.1%}", f"{guess['speed_up']['median']:.2f}"]
        rows.append([*cells, f"{speed['median']:.2f}{interval}", f"{error['speed_up']:+.1%}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    calls.run(main)
