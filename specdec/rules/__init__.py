"""Acceptance rules: who decides which drafted tokens stay. One rule per file."""

from specdec.rules.block import BlockVerification
from specdec.rules.rule import Decision, Decisions, Rule
from specdec.rules.sibling import SiblingRejection
from specdec.rules.traversal import TraversalVerification

__all__ = ["BlockVerification", "Decision", "Decisions", "Rule", "SiblingRejection", "TraversalVerification"]
