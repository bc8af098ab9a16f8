"""The best chain and tree for acceptance measured by depth and slot: Sequoia's program (arXiv:2402.12374)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from specdec.checks import as_float, as_int, as_parents, as_tuple
from specdec.theory.costs import Costs, predicted_speed_up


def expected_length(parents: Sequence[int], acceptance: Sequence[Sequence[float]]) -> float:
    """The expected acceptance length of a tree: the sum over its nodes of the chance that the path to them is accepted.

    Args:
        parents: the parent of every node, -1 for the root; parents come first, siblings in the order they are drawn.
        acceptance: [depth][slot], as from `positional_acceptance`. Depths are taken to be independent.
    """
    parents, acceptance = as_parents(parents), _levels(acceptance)
    depth, chance, children = [0], [1.0], [0] * len(parents)
    for node, parent in enumerate(parents[1:], 1):
        level, slot = (acceptance[depth[parent]] if depth[parent] < len(acceptance) else ()), children[parent]
        if slot >= len(level) and chance[parent] > 0:
            raise ValueError(
                f"Node {node} is child {slot} at depth {depth[parent]}, where acceptance is not known: record a larger "
                "tree, or ask for a smaller one."
            )
        chance.append(chance[parent] * level[slot] if slot < len(level) else 0.0)
        depth.append(depth[parent] + 1)
        children[parent] += 1
    return sum(chance)


def chain_speed_ups(rates: Sequence[float], costs: Costs) -> list[float]:
    """The predicted speed-ups of chains of 0, 1, ... drafted tokens.

    Args:
        rates: acceptance rate by depth, as in `Trace.summary`. Longer chains are not considered.
    """
    rates = _rates("rates", rates)
    chains = [list(range(-1, length)) for length in range(len(rates) + 1)]
    return [predicted_speed_up(expected_length(c, [[rate] for rate in rates]), c, costs) for c in chains]


def best_chain_length(rates: Sequence[float], costs: Costs) -> int:
    """The number of drafted tokens with the largest predicted speed-up; 0 if drafting does not pay."""
    return int(np.argmax(chain_speed_ups(rates, costs)))


def best_tree(acceptance: Sequence[Sequence[float]], costs: Costs, nodes: int = 32) -> list[int]:
    """The parents of the tree with the largest predicted speed-up, the root alone if drafting does not pay.

    Dynamic programming as in Sequoia (arXiv:2402.12374, here with acceptance by depth) finds the tree of longest expected
    acceptance for every depth and number of nodes. The fastest of these by the measured times is returned.

    Args:
        acceptance: [depth][slot], as from `positional_acceptance`. Deeper or wider trees are not considered.
        nodes: most nodes, the root included.
    """
    return best_trees(acceptance, costs, nodes)[0]


def best_trees(acceptance: Sequence[Sequence[float]], costs: Costs, nodes: int = 32) -> list[list[int]]:
    """For every number of nodes, the root alone included, the parents of the fastest tree: the fastest of all first.

    Arguments as for `best_tree`, which returns the first of them.
    """
    acceptance, nodes = _levels(acceptance), as_int("nodes", nodes, 1)
    depths = range(len(acceptance) + 1)
    speed = {
        tuple(tree): predicted_speed_up(expected_length(tree, acceptance), tree, costs)
        for depth in depths
        for tree in [[-1], *_longest(acceptance[:depth], nodes)]
    }
    ordered = sorted(speed, key=speed.__getitem__, reverse=True)
    first = {len(tree): tree for tree in reversed(ordered)}  # the fastest of each size
    return [[*tree] for tree in ordered if first[len(tree)] == tree]


def longest_tree(acceptance: Sequence[Sequence[float]], nodes: int) -> list[int]:
    """The parents of the tree of so many nodes with the longest expected acceptance, whatever they cost.

    Args:
        acceptance: [depth][slot], as from `positional_acceptance`. Deeper or wider trees are not considered.
        nodes: how many, the root included.
    """
    return _longest(_levels(acceptance), as_int("nodes", nodes, 1))[-1]


def _rates(name: str, rates: Any) -> tuple[float, ...]:
    """Chances, each from 0 to 1."""
    given = as_tuple(name, rates, "acceptance rates, as in Trace.summary()['acceptance_rate']")
    return tuple(as_float(f"{name}[{i}]", rate, "[0, 1]") for i, rate in enumerate(given))


def _levels(acceptance: Any) -> tuple[tuple[float, ...], ...]:
    """Chances by depth and slot, each from 0 to 1."""
    given = as_tuple("acceptance", acceptance, "levels, as from positional_acceptance(trace)")
    return tuple(_rates(f"acceptance[{depth}]", level) for depth, level in enumerate(given))


def _longest(acceptance: Sequence[Sequence[float]], nodes: int) -> list[list[int]]:
    """The parents of the tree with the longest expected acceptance, for 1, 2, ..., `nodes` nodes."""

    @cache
    def best(depth: int, slot: int, left: int) -> tuple[float, int]:
        """The most that `left` nodes add from `slot` on, with all below; and how many of them go to that child's subtree."""
        if depth == len(acceptance) or slot == len(acceptance[depth]):
            return 0.0, 0
        chance = acceptance[depth][slot]
        return max(
            (
                (chance * (1 + best(depth + 1, 0, own - 1)[0]) + best(depth, slot + 1, left - own)[0], own)
                for own in range(1, left + 1)
            ),
            default=(0.0, 0),
        )

    def grow(parents: list[int], node: int, depth: int, left: int) -> list[int]:
        slot = 0
        while own := best(depth, slot, left)[1]:
            parents.append(node)
            grow(parents, len(parents) - 1, depth + 1, own - 1)
            slot, left = slot + 1, left - own
        return parents

    return [grow([-1], 0, 0, count) for count in range(nodes)]
