"""Times of steps, taken in runs of probes, each beside steps without a draft."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from specdec.drafters import ModelDrafter
from specdec.trace import Step
from specdec.tuning.conditions import Conditions
from specdec.tuning.prices import Prices, Sample, work
from specdec.tuning.probes import COLD, Probe


def measured(
    probes: Sequence[Probe],
    groups: Iterable[list[Tensor]],
    conditions: Conditions,
    over: Callable[[], bool],
    say: Callable[[str], None],
) -> Prices:
    """Time the probes, round after round, each on another group of prompts, until time or the groups are over.

    What was compiled or captured in a first round of captured engines is not counted.
    """
    plain: list[Sample] = []
    drafted: dict[Any, list[Sample]] = {}
    alone: list[float] = []
    for turn, group in enumerate(groups):
        if over() and alone:
            break
        found: list[tuple[Probe, list[Step]]] = []
        for probe in probes:
            if over() and alone:
                break
            say(f"timing {probe.name or 'the target'}")
            found.append((probe, _steps(probe, group, conditions, turn)))
        if turn == 0 and probes[0].engine.captures and not over():
            continue
        if unit := _alone(found):
            alone.append(unit)
            for probe, steps in found:
                _sort(probe, steps, unit, plain, drafted)
    return Prices(plain, drafted, alone)


def _alone(found: Sequence[tuple[Probe, list[Step]]]) -> float:
    """Median seconds of the steps without a draft; 0 if there are none."""
    own = [
        _rest(step) + step.draft_seconds
        for probe, steps in found
        if probe.name is None
        for step in steps
        if step.nodes == 1
    ]
    return float(np.median(own)) if own else 0.0


def _sort(probe: Probe, steps: list[Step], unit: float, plain: list[Sample], drafted: dict[Any, list[Sample]]) -> None:
    for step in steps:
        if step.nodes not in probe.parents:  # cut at the end of a text
            continue
        sample = Sample(step.nodes, step.draft_seconds / unit, step.verify_seconds / unit, step.other_seconds / unit)
        if probe.name is None:
            plain.append(sample)
        else:
            key = probe.name, type(probe.rule).__name__, work(probe.parents[step.nodes])
            drafted.setdefault(key, []).append(sample)


def _rest(step: Step) -> float:
    return step.verify_seconds + step.other_seconds


def _steps(probe: Probe, group: Sequence[Tensor], conditions: Conditions, seed: int) -> list[Step]:
    """The steps of a run of the probe in which all rows were at work, but for the first ones."""
    steps = probe.steps if not probe.engine.captures else max(probe.steps, 8)
    # so many tokens as the steps may accept, if there is room, and no stop before: only time is of interest
    wanted = steps * (1 + probe.drafter.spec(conditions.sampling).depth)
    drafting = probe.drafter.lm.context_length if isinstance(probe.drafter, ModelDrafter) else None
    rooms = [room - max(map(len, group)) for room in (conditions.target.context_length, drafting) if room is not None]
    options = {"engine": probe.engine, "seed": seed, "max_new_tokens": min([wanted, *rooms]), "stop_tokens": ()}
    with conditions.stream(group, probe.drafter, rule=probe.rule, **options) as run:
        for _ in islice(run, steps):
            pass
        made = run.generation.trace.steps
    return [step for step in made[COLD:] if all(step.emitted)]
