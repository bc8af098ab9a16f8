"""What happened, step by step: metrics, recorded laws, and what another rule would have decided."""

from specdec.trace.bill import CostlyDraftsWarning
from specdec.trace.trace import LEVELS, Step, Trace, Visit, load, replay
from specdec.trace.visits import positional_acceptance

__all__ = ["LEVELS", "CostlyDraftsWarning", "Step", "Trace", "Visit", "load", "positional_acceptance", "replay"]
