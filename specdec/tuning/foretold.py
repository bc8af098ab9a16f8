"""Acceptance and speed-up of what was not run, from texts that the target wrote and the prices of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from specdec.drafters import Drafter, NgramDrafter, Paused, SuffixDrafter, TreeDrafter
from specdec.prediction import Text, replay
from specdec.rules import Rule, SiblingRejection
from specdec.sampling import Sampling
from specdec.theory import CostCurve
from specdec.trace import Step, Trace
from specdec.trees import Static, Widths
from specdec.tuning.conditions import afresh
from specdec.tuning.estimate import Estimate, redrawn
from specdec.tuning.prices import Prices, work
from specdec.tuning.probes import SIZES
from specdec.tuning.shapes import parents_of

# Texts, or groups that step together, that are read or replayed of each drafter even if time is over.
LEAST = 4
# Drafters that follow from the text alone.
FOLLOWS = (NgramDrafter, SuffixDrafter)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A drafter with its tree, and a rule.

    Args:
        name: what tables call the drafter.
        drafter: the drafter; None to draft nothing.
        rule: the rule.
    """

    name: str
    drafter: Drafter | None
    rule: Rule

    @property
    def parents(self) -> tuple[int, ...] | None:
        """The shape of its trees; None if they have no fixed one."""
        return parents_of(self.drafter)


ALONE = Candidate("autoregressive", None, SiblingRejection())


@dataclass(frozen=True)
class Foretold:
    """What is foretold of a candidate.

    Args:
        acceptance: tokens of a row per step.
        draft, verify, other: the parts of a step, in steps without a draft.
        speedup: over decoding without a draft.
        texts: how many it is foretold from.
    """

    acceptance: Estimate
    draft: float
    verify: float
    other: float
    speedup: Estimate
    texts: int

    @property
    def step(self) -> float:
        """A step, in steps without a draft."""
        return self.draft + self.verify + self.other


def of_tree(candidate: Candidate, texts: Sequence[Sequence[Text]], prices: Prices) -> Foretold:
    """What is foretold of trees of a fixed shape, exactly but for chance in the texts and the times.

    Args:
        texts: those of each prompt.
    """
    assert isinstance(candidate.drafter, TreeDrafter)
    tree, rule = candidate.drafter.tree, type(candidate.rule).__name__
    assert isinstance(tree, (Static, Widths))
    tokens = np.array([sum(len(text.tokens) for text in own) for own in texts], float)
    steps = np.array([sum(text.starts(tree, candidate.rule).sum() for text in own) for own in texts])
    nodes = len(tree.parents)
    parts = [
        prices.draft(candidate.name, work(tree.parents)),
        prices.verify(nodes),
        prices.other(candidate.name, rule, nodes),
    ]
    return _foretold(tokens, steps, parts, prices, sum(map(len, texts)))


def of_replays(
    traces: Sequence[Trace], idle: Trace, prompts: Sequence[int], prices: Prices, padded: int | None = None
) -> Foretold:
    """What is foretold of drafts that follow from the text.

    A replay tells what drafting and the loop take beyond those of a replay without a draft: above all what is accepted takes
    time. Captured steps take the same whatever is accepted.

    Args:
        traces: replays, one for each group of texts that step together.
        idle: a replay of the first group without a draft.
        prompts: of these texts, group after group: texts of one prompt are alike.
        prices: of steps.
        padded: nodes of every tree where steps are captured, which all have one shape.
    """
    emitted = [np.array([step.emitted for step in trace.steps]) for trace in traces]
    tokens, rows = (
        np.bincount(prompts, np.concatenate(of_texts))[np.unique(prompts)]
        for of_texts in ([each.sum(0) for each in emitted], [(each > 0).sum(0) for each in emitted])
    )
    nodes = [padded or step.nodes for trace in traces for step in full_steps(trace)]
    # each size as often as it occurs
    sizes, counts = np.unique(nodes, return_counts=True)
    verify = (counts / counts.sum()) @ np.array([prices.verify(size) for size in sizes.tolist()])
    drafting, deciding = np.median([_beside_the_pass(trace) for trace in traces], 0) - _beside_the_pass(idle)
    draft = np.full_like(verify, max(drafting, 0.0) / prices.unit)
    other = prices.plain_step(padded) - verify if padded else prices.loop + max(deciding, 0.0) / prices.unit
    return _foretold(tokens, rows, [draft, verify, other], prices, len(prompts))


def full_steps(trace: Trace) -> list[Step]:
    """The steps in which all rows were at work, or all if there are none."""
    return [step for step in trace.steps if all(step.emitted)] or trace.steps


def _beside_the_pass(trace: Trace) -> np.ndarray:
    """[2]: seconds of drafting, and of the loop, of a step in the mean."""
    return np.mean([(step.draft_seconds, step.other_seconds) for step in full_steps(trace)], 0)


def _foretold(
    tokens: np.ndarray, steps: np.ndarray, parts: Sequence[np.ndarray], prices: Prices, texts: int
) -> Foretold:
    """From tokens and steps of each prompt, and the parts of a step [1 + DRAWS] each."""
    drawn = redrawn(len(tokens), seed=1)
    acceptance = tokens[drawn].sum(1) / steps[drawn].sum(1)
    speed = acceptance * prices.undrafted / sum(parts)
    known = min(len(tokens), prices.samples)
    draft, verify, other = (float(part[0]) for part in parts)
    told = Estimate.of_draws(speed, known)
    return Foretold(Estimate.of_draws(acceptance, len(tokens)), draft, verify, other, told, texts)


def replayed(
    drafter: Drafter,
    groups: Sequence[tuple[list[Tensor], list[Tensor]]],
    vocab: int,
    sampling: Sampling,
    prices: Prices,
    over: Callable[[], bool],
    padded: int | None = None,
) -> list[Trace]:
    """The steps of a drafter without the target. A pause is decided by the prices, as there is no target to be timed.

    Args:
        groups: prompts and new tokens of the texts that step together.
        over: whether time is over; `LEAST` groups are replayed in any case.
        padded: as for `of_replays`.
    """
    if isinstance(drafter, Paused) and drafter.seconds is None:
        sizes = sorted({*SIZES, drafter.spec(sampling).nodes})
        curve = CostCurve(sizes, [float(prices.plain_step(padded or size)[0]) for size in sizes])
        drafter = Paused(drafter.drafter, drafter.patience, drafter.share, curve)
    drafter, traces = afresh(drafter), []
    for prompts, written in groups:
        traces.append(replay(prompts, written, drafter, vocab, sampling))
        if len(traces) >= LEAST and over():
            break
    return traces


def can_be_replayed(drafter: Drafter) -> bool:
    """Whether its drafts, and what they take, follow from the text and the price of plain steps."""
    return isinstance(drafter.drafter if isinstance(drafter, Paused) else drafter, FOLLOWS)
