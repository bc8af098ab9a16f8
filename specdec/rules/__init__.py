"""Acceptance rules: who decides which drafted tokens stay. One rule per file."""

from specdec.rules.base import Decision, Decisions, Rule
from specdec.rules.block import BlockVerification
from specdec.rules.kseq import KSeq
from specdec.rules.lenient import LenientRejection
from specdec.rules.level.rule import LevelVerification
from specdec.rules.sibling import SiblingRejection
from specdec.rules.traversal import TraversalVerification
from specdec.rules.typical import TypicalAcceptance

__all__ = [
    "BlockVerification",
    "Decision",
    "Decisions",
    "KSeq",
    "LenientRejection",
    "LevelVerification",
    "Rule",
    "SiblingRejection",
    "TraversalVerification",
    "TypicalAcceptance",
]
