"""How close acceptance rules come to the optimum of trees, on pairs of tables small enough for exact figures.

    python -m experiments.studies.tree_optimum   # minutes; needs no model, and scipy for the linear programs

Writes experiments/results/verification_optimum.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from itertools import count, product
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array

from experiments.bench.report import markdown
from experiments.bench.results import ROOT, provenance
from experiments.studies.toy_rules import kseq, level, sibling, traversal
from experiments.studies.toy_trees import Laws, Member, Prefix, family, flat, pair, trees
from specdec.laws import SAMPLED, Law

PAIRS = 20
SETTINGS = [(3, (2, 1)), (4, (2, 1)), (3, (2, 2)), (3, (3, 1)), (2, (2, 1, 1))]  # vocabulary, widths
FAMILIES = [(3, (2, 1), 2), (2, (2, 1), 4), (3, (2, 2), 2), (2, (2, 1, 1), 2)]  # vocabulary, widths, laws per context


def optimum(members: list[Member], widths: Prefix, law: Law) -> float:
    """Mean of the most accepted tokens that one verifier, valid for all members, can expect.

    A linear program over the chances that something is seen and the verifier stops at node v and emits y. Seen are the
    texts of the tree's nodes and, by their numbers, the laws after its inner nodes. In every member each text of `len(widths)`
    tokens must have the target's probability; shorter texts then do, and longer ones are left to the target. It is asked
    for no more than that probability, as it all adds up to 1: equations that follow from others are infeasible by rounding.
    """
    depth, vocab = len(widths), len(members[0][1][()])
    columns, gain = defaultdict(count().__next__), defaultdict(float)
    drafted, due, used, written = {}, {}, {}, {}
    for member, (numbers, p, q) in enumerate(members):
        due |= {(member, text): probability(p, text) for text in product(range(vocab), repeat=depth)}
        for nodes, chance in merged(q, widths, law).items():
            seen = nodes, tuple(numbers.get(u) for u in nodes)
            drafted[seen] = chance
            for v in nodes:
                for y in product(range(vocab), repeat=int(len(v) < depth)):
                    column, start = columns[seen, v, y], v + y
                    gain[column] += len(v) / len(members)
                    used[seen, column] = 1.0
                    for rest in product(range(vocab), repeat=depth - len(start)):
                        written[(member, start + rest), column] = probability(p, start + rest, len(start))
    solved = linprog(
        [-gain[i] for i in range(len(columns))],
        A_eq=matrix(used, drafted, len(columns)), b_eq=[*drafted.values()],
        A_ub=matrix(written, due, len(columns)), b_ub=[*due.values()],
    )  # fmt: skip
    if solved.status != 0:
        raise RuntimeError(f"The linear program was not solved: {solved.message}")
    return -solved.fun


def matrix(entries: dict[Any, float], rows: dict[Any, float], width: int) -> csr_array:
    """[row, column] of entries by the name of their row and their column."""
    number = {row: i for i, row in enumerate(rows)}
    places = [number[row] for row, _ in entries], [column for _, column in entries]
    return coo_array(([*entries.values()], places), (len(rows), width)).tocsr()


def probability(p: Laws, text: Prefix, start: int = 0) -> float:
    """The probability of the tokens of `text` from `start` on, given those before."""
    return math.prod(float(p[text[:i]][text[i]]) for i in range(start, len(text)))


def merged(q: Laws, widths: Prefix, law: Law) -> dict[tuple[Prefix, ...], float]:
    """The trees by the texts in them: how often a text stands there, and in which order, says nothing more."""
    chances = defaultdict(float)
    for chance, tree in trees(q, widths, law):
        chances[tuple(sorted({(), *(u for u, _ in flat(tree))}))] += chance
    return chances


def compare(vocab: int, widths: Prefix, law: Law, near: bool) -> dict[str, float]:
    """Mean over the pairs of every rule's expected accepted tokens, and of the optimum."""
    sums: dict[str, float] = defaultdict(float)
    for seed in range(PAIRS):
        p, q = pair(vocab, len(widths), seed, near)
        found = trees(q, widths, law)
        sums["optimum"] += optimum([({}, p, q)], widths, law)
        sums["sibling"] += sum(chance * sibling(p, tree) for chance, tree in found)
        if law == Law.IID:
            sums["K-SEQ"] += sum(chance * kseq(p, tree) for chance, tree in found)
        sums["traversal"] += sum(chance * traversal(p, tree)[1] for chance, tree in found)
        for rounds in (1, 2, 4):
            sums[f"level {rounds}"] += level(p, q, found, widths, law, rounds)
    return {name: value / PAIRS for name, value in sums.items()}


def rules_table() -> Iterator[list[str]]:
    names = ["sibling", "K-SEQ", "traversal", "level 1", "level 2", "level 4", "optimum"]
    yield ["drafts", "law", "vocab", "widths", *names, "gap collected by level 2"]
    for near, law, (vocab, widths) in product((False, True), SAMPLED, SETTINGS):
        if law == Law.SAMPLED_THEN_TOP and max(widths) >= vocab:
            continue  # all tokens are drafted
        mean = compare(vocab, widths, law, near)
        gap = mean["optimum"] - mean["traversal"]
        collected = f"{(mean['level 2'] - mean['traversal']) / gap:.0%}" if gap > 1e-6 else "no gap"
        shares = [f"{mean[n]:.4f} ({mean[n] / mean['optimum']:.1%})" if n in mean else "" for n in names[:-1]]
        where = ["near" if near else "independent", law.name, str(vocab), str(widths)]
        yield [*where, *shares, f"{mean['optimum']:.4f}", collected]


def families_table() -> Iterator[list[str]]:
    names = ["all laws known", "laws seen", "difference"]
    yield ["drafts", "law", "vocab", "widths", "laws per context", "members", *names]
    for near, law, (vocab, widths, values) in product((False, True), SAMPLED, FAMILIES):
        members = [list(family(vocab, len(widths), seed, near, values)) for seed in range(2)]
        known = np.mean([optimum([m], widths, law) for group in members for m in group])
        seen = np.mean([optimum(group, widths, law) for group in members])
        where = ["near" if near else "independent", law.name, str(vocab), str(widths), str(values)]
        yield [*where, str(len(members[0])), f"{known:.5f}", f"{seen:.5f}", f"{known - seen:.1e}"]


def shown(rows: Iterator[list[str]]) -> list[list[str]]:
    """All of them, each printed as soon as it is known."""
    found = []
    for row in rows:
        print(" | ".join(row), flush=True)
        found.append(row)
    return found


def main() -> None:
    torch.set_num_threads(1)
    first, second = markdown(shown(rules_table())), markdown(shown(families_table()))
    made = provenance("-m experiments.studies.tree_optimum", [], {"pairs": PAIRS}, "cpu")
    versions = ", ".join(f"{name} {v}" for name, v in {**made["versions"], "scipy": version("scipy")}.items())
    head = f"Commit {made['commit']}; {versions}; {made['date'][:10]}."
    path = ROOT / "experiments" / "results" / "verification_optimum.md"
    text = (ROOT / "experiments" / "studies" / "tree_optimum.md").read_text()
    path.write_text(text.format(made=head, rules=first, families=second))


if __name__ == "__main__":
    main()
