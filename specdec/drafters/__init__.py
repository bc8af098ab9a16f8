"""Drafters: who proposes. One drafter per file."""

from specdec.drafters.base import Context, Drafter
from specdec.drafters.fallback import Fallback
from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.drafters.medusa import MedusaDrafter, MedusaHeads
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.no_drafter import NoDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tree_drafter import TreeDrafter

__all__ = [
    "Context",
    "Drafter",
    "Fallback",
    "LayerSkipDrafter",
    "MedusaDrafter",
    "MedusaHeads",
    "ModelDrafter",
    "NgramDrafter",
    "NoDrafter",
    "SuffixDrafter",
    "TreeDrafter",
]
