"""Tree policies: who gets how many children, under which law. One policy per file."""

from specdec.trees.dynamic import Dynamic
from specdec.trees.policy import Frontier, Growth, TreePolicy
from specdec.trees.widths import Chain, Widths

__all__ = ["Chain", "Dynamic", "Frontier", "Growth", "TreePolicy", "Widths"]
