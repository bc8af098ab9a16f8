"""What the best verifier, tree and machine would give: ceilings of acceptance, the optimum of a chain, a cost model.

>>> specdec.theory.one_step_ceiling(p, Law.IID, q, count=4)  # no verifier accepts one of 4 children more often
"""

from specdec.theory.ceilings import one_step_ceiling
from specdec.theory.costs import CostCurve, Costs, measure_costs, predicted_speed_up
from specdec.theory.optima import chain_optimum
from specdec.theory.shapes import (
    best_chain_length,
    best_tree,
    best_trees,
    chain_speed_ups,
    expected_length,
    longest_tree,
)

__all__ = [
    "CostCurve",
    "Costs",
    "best_chain_length",
    "best_tree",
    "best_trees",
    "chain_optimum",
    "chain_speed_ups",
    "expected_length",
    "longest_tree",
    "measure_costs",
    "one_step_ceiling",
    "predicted_speed_up",
]
