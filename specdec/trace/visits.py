"""The nodes that a step visited, each with its ceiling: the best that any rule could do there."""

from __future__ import annotations

import numpy as np

from specdec.checks import check_kind
from specdec.laws import Law, is_random
from specdec.rules.base import Rule
from specdec.theory.ceilings import one_step_ceiling
from specdec.theory.divergence import divergence
from specdec.trace.laws import Record
from specdec.trace.trace import Trace, Visit
from specdec.tree import RowTree


def visits(record: Record, accepted: list[int], tried: list[int], rule: Rule) -> list[list[Visit]]:
    """For every row, the first tried[row] nodes of the path that the rule took, of which it accepted[row] drafted tokens."""
    tree, law, paths = record.tree(), record.law(), record.decisions.path.tolist()
    found = []
    for b, (path, kept, count) in enumerate(zip(paths, accepted, tried, strict=True)):
        row = tree.row(b)
        steps = ((path[d], path[d + 1] if d < kept else None) for d in range(count))
        found.append([_visit(row, node, child, law.probabilities(b, node), rule) for node, child in steps])
    return found


def _visit(tree: RowTree, node: int, accepted: int | None, p: np.ndarray, rule: Rule) -> Visit:
    children, law = tree.children(node), Law(tree.laws[node])
    points = [tree.tokens[child] for slot, child in enumerate(children) if not is_random(law, slot)]
    q, drawn = tree.weights(node, len(p)), {"count": len(children), "top": points}
    slot = None if accepted is None else children.index(accepted)
    return Visit(len(children), slot, one_step_ceiling(p, law, q, **drawn), divergence(rule, p, law, q, **drawn))


def positional_acceptance(trace: Trace) -> list[list[float]]:
    """[depth][slot]: how often the child in this place was accepted, among the steps that accepted its parent.

    At most one sibling is accepted, so the sum over slots is the chance to get one level deeper. With sampled laws the
    figures hold for the widths that they were recorded with, as a child's place decides how it was drawn.

    Args:
        trace: recorded with trace="ceiling".
    """
    check_kind("trace", trace, Trace)
    rows = [row for step in trace.steps for row in step.visits or ()]
    depths = range(max(map(len, rows), default=0))
    levels = [[row[depth] for row in rows if len(row) > depth] for depth in depths]
    return [
        [
            sum(visit.slot == slot for visit in level) / sum(visit.children > slot for visit in level)
            for slot in range(max(visit.children for visit in level))
        ]
        for level in levels
    ]
