"""Tree policies: who gets how many children, under which law. One policy per file."""

from specdec.trees.base import Frontier, Grown, Growth, TreePolicy, TreeRun
from specdec.trees.draw import Children, draw
from specdec.trees.dynamic import Dynamic
from specdec.trees.static import Static
from specdec.trees.widths import Chain, Widths

__all__ = [
    "Chain",
    "Children",
    "Dynamic",
    "Frontier",
    "Grown",
    "Growth",
    "Static",
    "TreePolicy",
    "TreeRun",
    "Widths",
    "draw",
]
