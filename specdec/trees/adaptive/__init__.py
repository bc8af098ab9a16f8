"""Trees whose size follows measured times and acceptance."""

from specdec.trees.adaptive.policy import Adaptive

__all__ = ["Adaptive"]
