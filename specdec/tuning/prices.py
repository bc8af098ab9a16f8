"""What steps take, in steps without a draft: measured samples, and lines through them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from specdec.checks import as_parents
from specdec.theory import CostCurve, Costs
from specdec.tuning.estimate import DRAWS, Estimate, medians
from specdec.tuning.shapes import depths


class Work(NamedTuple):
    """What drafting a tree consists of."""

    levels: int  # with children: one pass of a draft model each
    asked: int  # nodes with children: what these passes read


class Sample(NamedTuple):
    """The parts of a step, in steps without a draft beside it."""

    nodes: int
    draft: float
    verify: float
    other: float


def work(parents: Sequence[int]) -> Work:
    """The work of drafting a tree."""
    parents = as_parents(parents)
    depth, inner = depths(parents), {*parents[1:]}
    return Work(len({depth[node] for node in inner}), len(inner))


@dataclass(frozen=True)
class Prices:
    """Samples by what was drafted, and the price of a step as [1 + DRAWS] numbers: see `Estimate.of_draws`.

    Args:
        plain: of steps with drafts that cost nothing, or none.
        drafted: by drafter, rule and work: of steps with its trees.
        alone: seconds of steps without a draft.
    """

    plain: list[Sample] = field(default_factory=list)
    drafted: dict[tuple[str, str, Work], list[Sample]] = field(default_factory=dict)
    alone: list[float] = field(default_factory=list)

    def knows(self, drafter: str) -> bool:
        """Whether steps with trees of this drafter were timed."""
        return any(name == drafter for name, _, _ in self.drafted)

    @property
    def unit(self) -> float:
        """Seconds of a step without a draft."""
        return float(np.median(self.alone))

    @property
    def samples(self) -> int:
        """How many steps the least sampled size was timed in."""
        counts = [sum(sample.nodes == nodes for sample in self.plain) for nodes in {s.nodes for s in self.plain}]
        return min(counts, default=0)

    def sure(self, within: float) -> bool:
        """Whether the interval of every price reaches so far at most, in steps without a draft."""
        drafts = [medians(np.array([sample.draft for sample in samples])) for samples in self.drafted.values()]
        ends = np.quantile([self.undrafted, *self._verify[1], *drafts], [0.025, 0.975], axis=1)
        return bool(np.all(ends[1] - ends[0] <= 2 * within))

    @cached_property
    def _verify(self) -> tuple[np.ndarray, np.ndarray]:
        every = [*self.plain, *(sample for samples in self.drafted.values() for sample in samples)]
        return _curve((sample.nodes, sample.verify) for sample in every)

    @cached_property
    def _plain_other(self) -> tuple[np.ndarray, np.ndarray]:
        return _curve((sample.nodes, sample.other) for sample in self.plain)

    @cached_property
    def undrafted(self) -> np.ndarray:
        """[1 + DRAWS]: a step without a draft."""
        return medians(
            np.array([sample.draft + sample.verify + sample.other for sample in self.plain if sample.nodes == 1])
        )

    @property
    def loop(self) -> np.ndarray:
        """[1 + DRAWS]: a step without a draft, but for the target's pass."""
        return self.undrafted - self.verify(1)

    def verify(self, nodes: int) -> np.ndarray:
        """[1 + DRAWS]: the target's pass over so many nodes."""
        return _at(nodes, *self._verify)

    def plain_step(self, nodes: int) -> np.ndarray:
        """[1 + DRAWS]: a step with a tree of so many POINT nodes, but for drafting them."""
        return self.verify(nodes) + _at(nodes, *self._plain_other)

    @property
    def sizes(self) -> list[int]:
        """Sizes of trees that were timed."""
        return self._verify[0].tolist()

    def parts(self, nodes: int) -> tuple[float, float]:
        """The target's pass and the loop of a step with so many POINT nodes."""
        return float(self.verify(nodes)[0]), float((self.plain_step(nodes) - self.verify(nodes))[0])

    def draft(self, drafter: str, asked: Work) -> np.ndarray:
        """[1 + DRAWS]: drafting a tree."""
        return np.maximum(np.array([1, *asked]) @ self._line(drafter), 0.0)

    def _line(self, drafter: str) -> np.ndarray:
        """[3, 1 + DRAWS]: what drafting takes once, for each level and for each node that is asked for, by least squares."""
        times: dict[Work, list[float]] = {}
        for (name, _, asked), samples in self.drafted.items():
            if name == drafter:
                times.setdefault(asked, []).extend(sample.draft for sample in samples)
        features = np.array([[1, *asked] for asked in times], dtype=float)
        rows = np.array([medians(np.array(samples), seed) for seed, samples in enumerate(times.values())])
        return np.linalg.lstsq(features, rows)[0]

    def tells(self, drafter: str, rule: str) -> bool:
        """Whether the loop's own time is known of this drafter under this rule."""
        return (drafter, rule) in self._others or self._between(drafter, rule) is not None

    def other(self, drafter: str, rule: str, nodes: int) -> np.ndarray:
        """[1 + DRAWS]: the loop's own time, the rule's above all.

        Where the rule was timed with another drafter only: the time under a rule that both were timed under, and what the other
        drafter's takes more under this one.
        """
        timed = self._others
        if (drafter, rule) in timed:
            return _at(nodes, *timed[drafter, rule])
        between = self._between(drafter, rule)
        assert between is not None
        other, shared = between
        own, with_rule, without = (
            _at(nodes, *timed[key]) for key in ((drafter, shared), (other, rule), (other, shared))
        )
        return np.maximum(own + with_rule - without, 0.0)

    def _between(self, drafter: str, rule: str) -> tuple[str, str] | None:
        """Another drafter that was timed under this rule, and a rule that both were timed under."""
        under = {name: {rule for other, rule in self._others if other == name} for name, _ in self._others}
        own = under.get(drafter, set())
        return next(((name, min(its & own)) for name, its in under.items() if rule in its and its & own), None)

    @cached_property
    def _others(self) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """The loop's own time by drafter and rule."""
        pairs: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for (drafter, rule, _), samples in self.drafted.items():
            pairs.setdefault((drafter, rule), []).extend((sample.nodes, sample.other) for sample in samples)
        return {key: _curve(own) for key, own in pairs.items()}

    def step(self, drafter: str, rule: str, parents: Sequence[int]) -> np.ndarray:
        """[1 + DRAWS]: a step with such a tree."""
        nodes = len(parents)
        return self.draft(drafter, work(parents)) + self.verify(nodes) + self.other(drafter, rule, nodes)

    def costs(self, drafter: str, rule: str, nodes: int) -> Costs:
        """The same without intervals, as the search for shapes takes it: of trees of at most so many nodes."""
        once, level, asked = self._line(drafter)[:, 0].clip(0).tolist()
        sizes = sorted({1, 2, *(size for size in self._verify[0].tolist() if size < nodes), nodes})
        own = [float(self.other(drafter, rule, size)[0]) + once * (size > 1) for size in sizes]
        verify = CostCurve(sizes, [float(self.verify(size)[0]) for size in sizes])
        draft = CostCurve((1, nodes), (level + asked, level + asked * nodes))
        return Costs(verify, draft, CostCurve(sizes, np.maximum(own, 0.0).tolist()))

    @property
    def noise(self) -> Estimate:
        """How far apart two steps without a draft are: their quartiles over their median."""
        low, middle, high = np.percentile(
            [s.draft + s.verify + s.other for s in self.plain if s.nodes == 1], [25, 50, 75]
        )
        return Estimate(1.0, float(low / middle), float(high / middle))


def _curve(pairs: Iterable[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes, and [size, 1 + DRAWS] medians."""
    by_nodes: dict[int, list[float]] = {}
    for nodes, seconds in pairs:
        by_nodes.setdefault(nodes, []).append(seconds)
    sizes = sorted(by_nodes)
    return np.array(sizes), np.array([medians(np.array(by_nodes[nodes]), nodes) for nodes in sizes])


def _at(nodes: int, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[1 + DRAWS]: between two sizes, and beyond the last one, on the straight line through them."""
    if len(sizes) == 1:
        return np.broadcast_to(draws[0], (1 + DRAWS,))
    i = int(np.clip(np.searchsorted(sizes, nodes) - 1, 0, len(sizes) - 2))
    share = (nodes - sizes[i]) / (sizes[i + 1] - sizes[i])
    return (1 - share) * draws[i] + share * draws[i + 1]
