"""Shapes of trees, and which may be fast, from the chance that a child of each depth and place is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.drafters import Drafter, TreeDrafter
from specdec.laws import Law
from specdec.prediction import Text
from specdec.theory import Costs, best_trees
from specdec.trees import Static, Widths

# Most of a tree.
NODES = 32
# Most children of a node.
_WIDTH = 4
# Trees of so many sizes are looked at more closely.
_TREES = 8


def parents_of(drafter: Drafter | None) -> tuple[int, ...] | None:
    """The shape of a drafter's trees; None if they have no fixed one."""
    tree = drafter.tree if isinstance(drafter, TreeDrafter) else None
    return tuple(tree.parents) if isinstance(tree, (Static, Widths)) else None


def is_chain(parents: Sequence[int]) -> bool:
    """Whether no node has two children."""
    return list(parents) == list(range(-1, len(parents) - 1))


def depths(parents: Sequence[int]) -> list[int]:
    """Edges from the root to each node."""
    found = [0]
    for parent in parents[1:]:
        found.append(found[parent] + 1)
    return found


def positional(texts: Sequence[Text], depth: int, law: Law) -> list[list[float]]:
    """[depth][slot]: how often sibling rejection accepts the slot-th child, where all before it on the path were accepted."""
    width = min(_WIDTH, texts[0].target.shape[1])
    hits, tried = np.zeros((depth, width)), np.zeros(depth)
    for text in texts:
        for start in range(len(text.tokens)):
            reached = 1.0
            for below, place in enumerate(range(start, min(start + depth, len(text.tokens)))):
                tried[below] += reached
                chances = text.chances(place, law, width, below)
                for slot, chance in chances:
                    hits[below, slot] += reached * chance
                reached *= sum(chance for _, chance in chances)
                if not reached:
                    break
    known = int((tried > 0).sum())
    return (hits[:known] / tried[:known, None]).clip(0, 1).tolist()


def proposed(acceptance: Sequence[Sequence[float]], costs: Costs) -> list[tuple[int, ...]]:
    """The parents of trees to be looked at more closely, the most promising first, each with a draft.

    Args:
        acceptance: [depth][slot], as from `positional`.
    """
    first, *trees = [tuple(tree) for tree in best_trees(acceptance, costs, NODES) if len(tree) > 1][:_TREES]
    single = [[min(sum(slots), 1.0)] for slots in acceptance]
    chains = [tuple(tree) for tree in best_trees(single, costs, len(acceptance) + 1) if len(tree) > 1]
    return [*dict.fromkeys([first, *chains, *trees])]
