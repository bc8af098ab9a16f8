"""Which drafter, tree and rule for this target, these prompts and this machine: `specdec.tune`.

A search goes through parts, each in a file: `writing` (the target's own texts), `layers` (which to leave out), `measuring` and
`prices` (what steps take), `search`, `shapes` and `foretold` (what follows of every candidate), `checking` (decoding the best),
`rows`, `findings`, `plan`, `reasons`, `tables` and `pictures` (what is said of it), `roofline` (where the time goes), `files`.
"""

from specdec.tuning.estimate import Estimate
from specdec.tuning.plan import Plan
from specdec.tuning.rows import Row, Speedup
from specdec.tuning.tune import tune

__all__ = ["Estimate", "Plan", "Row", "Speedup", "tune"]
