"""Times of steps, taken in runs of probes, each beside steps without a draft."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from torch import Tensor

from specdec.drafters import ModelDrafter
from specdec.generate import Generation
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
) -> Iterator[Prices]:
    """Time the probes, round after round, each on another group of prompts, until time or the groups are over.

    Yields what is known after each round. What was compiled or captured in a first round of captured engines is not counted.
    """
    prices = Prices()
    for turn, group in enumerate(groups):
        found: list[tuple[Probe, list[Step]]] = []
        last = None
        for probe in probes:
            if over() and prices.alone:
                break
            say(f"timing {probe.name or 'the target'}")
            steps, last = _steps(probe, group, conditions, turn, last)
            found.append((probe, steps))
        if turn == 0 and probes[0].engine.static_shapes and not over():
            continue
        if unit := _alone(found):
            prices = _joined(prices, unit, found)
            yield prices
        if over() and prices.alone:
            return


def _alone(found: Sequence[tuple[Probe, list[Step]]]) -> float:
    """Median seconds of the steps without a draft; 0 if there are none."""
    alone = [steps for probe, steps in found if probe.name is None and 1 in probe.parents]
    own = [sum(_parts(step)) for steps in alone for step in steps if step.nodes == 1]
    return float(np.median(own)) if own else 0.0


def _joined(prices: Prices, unit: float, found: Sequence[tuple[Probe, list[Step]]]) -> Prices:
    """Prices with the steps of one more round."""
    plain, drafted = [*prices.plain], {key: [*samples] for key, samples in prices.drafted.items()}
    for probe, steps in found:
        for step in steps:
            if step.nodes not in probe.parents:  # cut at the end of a text
                continue
            key = probe.name or "", type(probe.rule).__name__, work(probe.parents[step.nodes])
            own = plain if probe.name is None else drafted.setdefault(key, [])
            own.append(Sample(step.nodes, *(part / unit for part in _parts(step))))
    return Prices(plain, drafted, [*prices.alone, unit])


def _parts(step: Step) -> tuple[float, float, float]:
    return step.draft_seconds, step.verify_seconds, step.other_seconds


def _steps(
    probe: Probe, group: Sequence[Tensor], conditions: Conditions, seed: int, last: Generation | None
) -> tuple[list[Step], Generation | None]:
    """The steps of a run in turn in which all rows were at work, but for the first ones; and the run, if it is kept."""
    steps = probe.steps if not probe.engine.static_shapes else max(probe.steps, 8)
    # so many tokens as the steps may accept, if there is room, and no stop before: only time is of interest
    wanted = steps * (1 + probe.drafter.spec(conditions.sampling).depth)
    drafting = probe.drafter.lm.context_length if isinstance(probe.drafter, ModelDrafter) else None
    rooms = [room - max(map(len, group)) for room in (conditions.target.context_length, drafting) if room is not None]
    options = {"rule": probe.rule, "seed": seed, "max_new_tokens": min([wanted, *rooms]), "stop_tokens": ()}
    with conditions.in_turn(group, last, probe.engine, probe.drafter, **options) as run:
        for _ in islice(run, steps):
            pass
        made = run.generation.trace.steps
    return [step for step in made[COLD:] if all(step.emitted)], conditions.kept(run.generation)
