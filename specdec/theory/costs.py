"""What a step costs: measured times of forward passes, and the speed-up that they allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedModel

from specdec.checks import as_float, as_int, as_ints, as_parents, as_tuple, check_callable, check_kind, put
from specdec.clock import finish, host_seconds
from specdec.models.causal_lm import CausalLM
from specdec.tree import chain


@dataclass(frozen=True)
class CostCurve:
    """Measured times of a forward pass, interpolated linearly.

    Args:
        nodes: sizes of trees, increasing.
        seconds: the time of a pass for each size.
    """

    nodes: Sequence[int]
    seconds: Sequence[float]

    def __post_init__(self) -> None:
        nodes = as_ints("nodes", self.nodes, 1)
        given = as_tuple("seconds", self.seconds, "times")
        seconds = tuple(as_float(f"seconds[{i}]", each, "[0, inf)") for i, each in enumerate(given))
        if not nodes or len(nodes) != len(seconds) or any(a >= b for a, b in pairwise(nodes)):
            raise ValueError(
                f"nodes={nodes}, seconds={seconds}: must be equally many, at least one, and nodes must increase."
            )
        put(self, nodes=nodes, seconds=seconds)

    def __call__(self, nodes: int) -> float:
        """Seconds of a forward pass over this many nodes per row."""
        nodes = as_int("nodes", nodes)
        if not self.nodes[0] <= nodes <= self.nodes[-1]:
            raise ValueError(
                f"{nodes} nodes: costs were measured from {self.nodes[0]} to {self.nodes[-1]}; measure more."
            )
        return float(np.interp(nodes, self.nodes, self.seconds))


@dataclass(frozen=True)
class Costs:
    """What a step costs, in seconds.

    Args:
        verify: the target's forward pass, by nodes of the tree.
        draft: the draft model's forward pass, by nodes of a level; None if drafting is free.
        other: the loop's own time, by nodes of the tree; None if it is not counted.
    """

    verify: CostCurve
    draft: CostCurve | None = None
    other: CostCurve | None = None

    def __post_init__(self) -> None:
        for name in ("verify", "draft", "other"):
            curve = getattr(self, name)
            if curve is not None or name == "verify":
                check_callable(name, curve, "pass a CostCurve, as measure_costs(target, draft) makes them")

    def step(self, parents: Sequence[int]) -> float:
        """Seconds to draft the tree level by level (one forward pass for each level with children) and to verify it."""
        parents = as_parents(parents)
        depth, levels = [0], {}
        for parent in parents[1:]:
            depth.append(depth[parent] + 1)
        for node in set(parents[1:]):
            levels[depth[node]] = levels.get(depth[node], 0) + 1
        drafting = sum(map(self.draft, levels.values())) if self.draft is not None else 0.0
        own = self.other(len(parents)) if self.other is not None else 0.0
        return drafting + self.verify(len(parents)) + own


def measure_costs(
    target: PreTrainedModel,
    draft: PreTrainedModel | None = None,
    *,
    nodes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    context: int = 128,
    batch: int = 1,
    repeats: int = 15,
) -> Costs:
    """Median times of the forward passes that the loop makes, over interleaved rounds.

    Args:
        draft: the draft model; None where drafting costs next to nothing, as with n-grams.
        nodes: sizes to measure; between them times are interpolated.
        context: tokens in the cache of every row.
        batch: rows.
        repeats: rounds, after one that is not counted.
    """
    for name, model, none in (("target", target, ()), ("draft", draft, (type(None),))):
        check_kind(name, model, (PreTrainedModel, *none), "pass a transformers model")
    sizes = sorted({1, *as_ints("nodes", nodes, 1)})
    context, batch = as_int("context", context, 0), as_int("batch", batch, 1)
    repeats = as_int("repeats", repeats, 1)
    forwards = [_forward(model, sizes[-1], context, batch) for model in (target, draft) if model is not None]
    times = [[[forward(size) for size in sizes] for forward in forwards] for _ in range(repeats + 1)][1:]
    medians = np.median(times, axis=0).tolist()  # [model][size]
    curves = [CostCurve(tuple(sizes), tuple(seconds)) for seconds in medians]
    return Costs(*curves)


def _forward(model: PreTrainedModel, most: int, context: int, batch: int) -> Callable[[int], float]:
    """A function from a number of nodes to the seconds of one forward pass of such a chain after `context` tokens."""
    lm = CausalLM(model)
    tokens = torch.arange(context + most, device=lm.device).remainder(lm.vocab).expand(batch, -1)
    with torch.inference_mode():
        cached = lm.start(batch, context + most, most)
        cached.read_anew(tokens, dict.fromkeys(range(batch), context))

    def forward(nodes: int) -> float:
        with torch.inference_mode():
            finish(lm.device)
            began = host_seconds()
            cached.forward(tokens[:, :nodes], chain(batch, nodes, lm.device), context)
            finish(lm.device)
            return host_seconds() - began

    return forward


def predicted_speed_up(acceptance_length: float, parents: Sequence[int], costs: Costs) -> float:
    """Acceptance length x t(1) / t(step), over decoding without a draft. The loop's own time counts by `costs.other` only."""
    acceptance_length = as_float("acceptance_length", acceptance_length, "[0, inf)")
    check_kind("costs", costs, Costs, "measure them: specdec.theory.measure_costs(target, draft)")
    return acceptance_length * costs.step([-1]) / costs.step(parents)
