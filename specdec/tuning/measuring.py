"""Times of steps, taken in runs of trees of several sizes that take turns, each beside steps without a draft."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from specdec.drafters import BlockDrafter, Drafter, ModelDrafter, TreeDrafter
from specdec.generate import stream
from specdec.models.target import Target
from specdec.rules import BlockVerification, Rule, SiblingRejection, TraversalVerification
from specdec.sampling import Sampling
from specdec.trace import Step
from specdec.trees import Widths
from specdec.tuning.offers import Offer
from specdec.tuning.prices import Prices, Sample, work
from specdec.tuning.probes import InTurn, Stars

SIZES = (1, 2, 4, 8, 16, 32)  # of trees without a drafter
DEEPEST = 8  # trees that are looked for
_COLD = 2  # steps of a run that are not counted: they make constants and fill caches
_TURNS = 3  # of each size in a run
_SHAPES = ((1, 1), (1,) * 5, (3, 3), (3, 3, 2))  # each of another size


@dataclass(frozen=True)
class Conditions:
    """What every run of a search has in common.

    Args:
        target: the target.
        sampling: the sampling, with every field resolved.
        batch: rows.
        engine: makes the engine of a method. Each has its own, as an engine keeps captured steps of one kind only.
        options: more for `generate`.
    """

    target: Target
    sampling: Sampling
    batch: int
    engine: Callable[[], Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Probe:
    """A run that is timed: a drafter of steps whose sizes tell what was drafted."""

    name: str | None  # of the drafter; None without one
    drafter: Drafter
    rule: Rule
    parents: Mapping[int, Sequence[int]]  # by nodes
    engine: Any

    @property
    def steps(self) -> int:
        return _COLD + _TURNS * len(self.parents)


def rules(sampling: Sampling) -> list[Rule]:
    """Those that are compared: greedy decoding accepts the same by all of them."""
    if sampling.temperature == 0:
        return [SiblingRejection()]
    return [SiblingRejection(), BlockVerification(), TraversalVerification()]


def deepest(drafter: TreeDrafter) -> int:
    """The deepest tree that a drafter can grow."""
    return min(drafter.net.depth, DEEPEST) if isinstance(drafter, BlockDrafter) else DEEPEST


def probes(offers: Sequence[Offer], conditions: Conditions) -> list[Probe]:
    """The runs to be timed: of trees without a drafter, and of each drafter that grows trees, under each rule."""
    apart = conditions.engine().captures  # captured steps have one shape in a run
    sizes = [size for size in SIZES if size <= conditions.target.vocab]
    made = []
    for group in [[size] for size in sizes] if apart else [sizes]:
        stars = {size: [-1, *[0] * (size - 1)] for size in group}
        made.append(Probe(None, Stars(group), SiblingRejection(), stars, conditions.engine()))
    for offer in offers:
        if not isinstance(offer.drafter, TreeDrafter):
            continue
        alone = apart or isinstance(offer.drafter, BlockDrafter)  # a block is as deep as the deepest tree of its run
        for rule in rules(conditions.sampling):
            trees = _trees(deepest(offer.drafter), rule)
            for group in [[tree] for tree in trees] if alone else [trees]:
                parents = {len(tree.parents): tree.parents for tree in group}
                drafter = offer.drafter.with_tree(InTurn(group))
                made.append(Probe(offer.name, drafter, rule, parents, conditions.engine()))
    return made


def _trees(deepest: int, rule: Rule) -> list[Widths]:
    """Chains, and trees unless the rule is for chains only."""
    wanted = [shape[:deepest] for shape in _SHAPES if max(shape) == 1 or not isinstance(rule, BlockVerification)]
    return [Widths(shape) for shape in dict.fromkeys(wanted)]


def measured(
    probes: Sequence[Probe],
    groups: Iterator[list[Tensor]],
    conditions: Conditions,
    over: Callable[[], bool],
    say: Callable[[str], None],
) -> Prices:
    """Time the probes, round after round, each on another group of prompts, until time is over.

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
    options = {
        **conditions.options,
        "sampling": conditions.sampling,
        "engine": probe.engine,
        "seed": seed,
        "max_new_tokens": min([wanted, *rooms]),
        "stop_tokens": (),
    }
    with stream(conditions.target, list(group), probe.drafter, rule=probe.rule, **options) as run:
        for _ in islice(run, steps):
            pass
        made = run.generation.trace.steps
    return [step for step in made[_COLD:] if all(step.emitted)]
