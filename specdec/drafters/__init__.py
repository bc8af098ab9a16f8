"""Drafters propose draft trees. One drafter per file."""

from specdec.drafters.base import Drafter, DraftRun
from specdec.drafters.dflash import DFlashDrafter, DFlashNet
from specdec.drafters.dspark import DSparkDrafter, DSparkNet
from specdec.drafters.eagle import EagleDrafter, EagleNet
from specdec.drafters.eagle3 import Eagle3Drafter, Eagle3Net
from specdec.drafters.fallback import Fallback
from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.drafters.medusa import MedusaDrafter, MedusaHeads
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.no_drafter import NoDrafter
from specdec.drafters.paused import Paused
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tree_drafter import TreeDrafter, TreeDraftRun

__all__ = [
    "DFlashDrafter",
    "DFlashNet",
    "DSparkDrafter",
    "DSparkNet",
    "DraftRun",
    "Drafter",
    "Eagle3Drafter",
    "Eagle3Net",
    "EagleDrafter",
    "EagleNet",
    "Fallback",
    "LayerSkipDrafter",
    "MedusaDrafter",
    "MedusaHeads",
    "ModelDrafter",
    "NgramDrafter",
    "NoDrafter",
    "Paused",
    "SuffixDrafter",
    "TreeDraftRun",
    "TreeDrafter",
]
