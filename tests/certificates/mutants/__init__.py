"""Bugs that shipped elsewhere, each planted in a rule, a drafter or the loop: a certificate must fail on every one.

with mutant.planted():
    mutant.case.certify()["total_variation"]  # above 0
"""

from certificates.mutants.drafters import IN_DRAFTERS
from certificates.mutants.library import IN_RULES, UNCAPPED, example
from certificates.mutants.loop import IN_LOOP
from certificates.mutants.mutant import DRAFT, STOP, TREES, Mutant
from certificates.mutants.rules import BROKEN_RULES, Sequential

MUTANTS = [*BROKEN_RULES, *IN_DRAFTERS, *IN_LOOP, *IN_RULES, UNCAPPED]

__all__ = ["DRAFT", "IN_RULES", "MUTANTS", "STOP", "TREES", "Mutant", "Sequential", "example"]
