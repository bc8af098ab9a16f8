"""The nodes that a step visited, each with the best that any rule could do there."""

from __future__ import annotations

import numpy as np

from specdec.rules.base import Rule
from specdec.theory.ceilings import one_step_ceiling
from specdec.theory.divergence import divergence
from specdec.trace.laws import Record
from specdec.trace.trace import Visit
from specdec.tree import Law, RowTree


def visits(record: Record, accepted: list[int], tried: list[int], rule: Rule) -> list[list[Visit]]:
    """For every row, the first tried[row] nodes of the path that was decided on, of which it accepted[row] drafted tokens."""
    tree, law, coins, paths = record.tree(), record.law(), record.coins(), record.decisions.path.tolist()
    found = []
    for b, (path, kept, count) in enumerate(zip(paths, accepted, tried, strict=True)):
        row = tree.row(b, coins.row(b))
        steps = ((path[d], path[d + 1] if d < kept else None) for d in range(count))
        found.append([_visit(row, node, child, law.probabilities(b, node), rule) for node, child in steps])
    return found


def _visit(tree: RowTree, node: int, accepted: int | None, p: np.ndarray, rule: Rule) -> Visit:
    children, law = tree.children(node), Law(tree.laws[node])
    known = {Law.POINT: children, Law.SAMPLED_THEN_TOP: children[1:]}.get(law, [])
    probs = tree.tree.draft_probs
    q = None if law == Law.POINT or probs is None else probs[tree.row, node].double().numpy(force=True)
    drawn = {"count": len(children), "top": [tree.tokens[child] for child in known]}
    slot = None if accepted is None else children.index(accepted)
    return Visit(len(children), slot, one_step_ceiling(p, law, q, **drawn), divergence(rule, p, law, q, **drawn))
