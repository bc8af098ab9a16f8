"""Tree policies: which nodes get how many children, and by which law they are drawn. One policy per file."""

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
