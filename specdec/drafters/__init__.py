"""Drafters propose draft trees. One drafter per file."""

from specdec.drafters.base import Drafter, DraftRun
from specdec.drafters.block import BlockDrafter, BlockNet
from specdec.drafters.dflash import DFlashDrafter, DFlashNet
from specdec.drafters.dspark import DSparkDrafter, DSparkNet
from specdec.drafters.eagle import EagleDrafter, EagleNet
from specdec.drafters.eagle3 import Eagle3Drafter, Eagle3Net, Eagle3Reading
from specdec.drafters.fallback import Fallback
from specdec.drafters.feature import FeatureDrafter, FeatureNet
from specdec.drafters.gemma4_assistant import Gemma4AssistantDrafter
from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.drafters.medusa import MedusaDrafter, MedusaHeads
from specdec.drafters.model import ModelDrafter
from specdec.drafters.mtp import MtpDrafter, MtpNet
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.no_drafter import NoDrafter
from specdec.drafters.paused import Paused
from specdec.drafters.points import Point, PointRun
from specdec.drafters.readings import check
from specdec.drafters.states_drafter import StatesDrafter
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tree_drafter import TreeDrafter, TreeDraftRun

__all__ = [
    "BlockDrafter",
    "BlockNet",
    "DFlashDrafter",
    "DFlashNet",
    "DSparkDrafter",
    "DSparkNet",
    "DraftRun",
    "Drafter",
    "Eagle3Drafter",
    "Eagle3Net",
    "Eagle3Reading",
    "EagleDrafter",
    "EagleNet",
    "Fallback",
    "FeatureDrafter",
    "FeatureNet",
    "Gemma4AssistantDrafter",
    "LayerSkipDrafter",
    "MedusaDrafter",
    "MedusaHeads",
    "ModelDrafter",
    "MtpDrafter",
    "MtpNet",
    "NgramDrafter",
    "NoDrafter",
    "Paused",
    "Point",
    "PointRun",
    "StatesDrafter",
    "StatesNet",
    "SuffixDrafter",
    "TargetParts",
    "TreeDraftRun",
    "TreeDrafter",
    "check",
]
