"""Drafters: who proposes. One drafter per file."""

from specdec.drafters.drafter import Context, Drafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.nothing import NoDrafter

__all__ = ["Context", "Drafter", "ModelDrafter", "NgramDrafter", "NoDrafter"]
