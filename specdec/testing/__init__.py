"""Proofs by enumeration: every coin of the real loop is followed to every outcome, and the laws are compared exactly.

>>> specdec.testing.assert_lossless(MyRule())            # any rule, on the standard battery
>>> specdec.testing.assert_fast_path(MyRule())           # its batched code, in its own arithmetic
>>> law = specdec.testing.exact_law(target, prompt, drafter, max_new_tokens=3)  # any small target and drafter
>>> engine = specdec.Graphs(capture=specdec.testing.Tape)  # captured steps without a GPU
>>> print(specdec.testing.audit(generate, log_probs))  # samples of real models instead; see `specdec.testing.audit`
"""

from specdec.testing.audit import Audit, audit, model_log_probs
from specdec.testing.coins import ExactCoins, Script
from specdec.testing.drafters import assert_drafter
from specdec.testing.laws import ExactLaw, exact_law, exact_law_in_slots, target_law
from specdec.testing.rules import assert_fast_path, assert_lossless
from specdec.testing.tables import Table, TabularDrafter, TabularTarget
from specdec.testing.tape import Tape

__all__ = [
    "Audit",
    "ExactCoins",
    "ExactLaw",
    "Script",
    "Table",
    "TabularDrafter",
    "TabularTarget",
    "Tape",
    "assert_drafter",
    "assert_fast_path",
    "assert_lossless",
    "audit",
    "exact_law",
    "exact_law_in_slots",
    "model_log_probs",
    "target_law",
]
