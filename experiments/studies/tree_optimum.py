"""How close acceptance rules come to the optimum of trees, on pairs of tables small enough for exact figures.

    python -m experiments.studies.tree_optimum            # about 5 minutes, no model needed; scipy solves the linear programs

Writes experiments/results/verification_optimum.md.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from experiments.bench.report import markdown
from experiments.bench.results import ROOT, provenance
from specdec import DraftTree, Sampling
from specdec.laws import SAMPLED, Law, child_weights, drafts, normalised
from specdec.rules import LevelVerification
from specdec.rules.residual import residual
from specdec.target_law import LogitsLaw
from specdec.tree import Topology

Prefix = tuple[int, ...]
Laws = dict[Prefix, np.ndarray]  # after each prefix, [vocab]
Tree = tuple[tuple[int, np.ndarray, Any], ...]  # of each child: token, the law it was drawn from, its own children

PAIRS = 20
SETTINGS = [(3, (2, 1)), (4, (2, 1)), (3, (2, 2)), (3, (3, 1)), (2, (2, 1, 1))]  # vocabulary, widths
FAMILIES = [(3, (2, 1), 2), (2, (2, 1), 4), (3, (2, 2), 2), (2, (2, 1, 1), 2)]  # vocabulary, widths, laws per context


def pair(vocab: int, depth: int, seed: Any, near: bool) -> tuple[Laws, Laws]:
    """Target and draft laws after every prefix shorter than `depth`: softmax of normal logits of deviation 1.5."""
    rng = np.random.default_rng(seed)
    p, q = {}, {}
    for u in prefixes(vocab, depth):
        logits = rng.normal(0, 1.5, vocab)
        p[u] = softmax(logits)
        q[u] = softmax(logits + rng.normal(0, 0.5, vocab) if near else rng.normal(0, 1.5, vocab))
    return p, q


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def prefixes(vocab: int, depth: int) -> Iterator[Prefix]:
    for length in range(depth):
        yield from itertools.product(range(vocab), repeat=length)


# --- all trees of a draft, with their probabilities


def draws(q: np.ndarray, count: int, law: Law) -> Iterator[tuple[float, Prefix, list[np.ndarray]]]:
    """(probability, tokens, law of each given the earlier ones) of all sets of siblings."""
    for tokens, chance in drafts(law, q, count).items():
        yield chance, tokens, [normalised(child_weights(law, q, tokens, slot)) for slot in range(count)]


def trees(q: Laws, widths: Prefix, law: Law, u: Prefix = ()) -> list[tuple[float, Tree]]:
    if len(u) == len(widths):
        return [(1.0, ())]
    found = []
    for chance, tokens, laws in draws(q[u], widths[len(u)], law):
        for below in itertools.product(*(trees(q, widths, law, (*u, x)) for x in tokens)):
            tree = tuple((x, each, sub) for x, each, (_, sub) in zip(tokens, laws, below, strict=True))
            found.append((chance * math.prod(b for b, _ in below), tree))
    return found


# --- the accepted tokens that a rule expects of one tree


def sibling(p: Laws, tree: Tree, u: Prefix = ()) -> float:
    owed, alive, value = p.get(u), 1.0, 0.0
    for x, law, below in tree:
        assert owed is not None
        hit = min(1, owed[x] / law[x])
        value += alive * hit * (1 + sibling(p, below, (*u, x)))
        alive, owed = alive * (1 - hit), residual(1, owed, law)[1]
    return value


def kseq(p: Laws, tree: Tree, u: Prefix = ()) -> float:
    if not tree:
        return 0.0
    q, k, low, high = tree[0][1], len(tree), 1.0, float(len(tree))
    for _ in range(40):
        rho = (low + high) / 2
        beta = np.minimum(p[u] / rho, q).sum()
        low, high = (low, rho) if rho * beta + (1 - beta) ** k >= 1 else (rho, high)
    value, alive = 0.0, 1.0
    for x, _, below in tree:
        hit = min(1, p[u][x] / (high * q[x]))
        value += alive * hit * (1 + kseq(p, below, (*u, x)))
        alive *= 1 - hit
    return value


def traversal(p: Laws, tree: Tree, u: Prefix = (), reach: float = 1.0) -> tuple[float, float]:
    """(chance to stop at or below u, expected depth of the stops there)."""
    alive, value, owed = 1.0, 0.0, p.get(u)
    for x, law, below in tree:
        assert owed is not None
        stopped, depth = traversal(p, below, (*u, x), min(1, reach * owed[x] / law[x]))
        value, alive = value + alive * depth, alive * (1 - stopped)
        reach, owed = residual(reach, owed, law)
    return 1 - alive * (1 - reach), value + alive * reach * len(u)


def level(p: Laws, q: Laws, found: list[tuple[float, Tree]], widths: Prefix, law: Law, rounds: int) -> float:
    """Over all trees, by the rule's own fast path."""
    rows = [flat(tree) for _, tree in found]
    tokens = torch.tensor([[0, *(u[-1] for u, _ in row)] for row in rows])
    parents = torch.tensor([[-1, *(parent for _, parent in row)] for row in rows])
    vocab, inner = len(p[()]), 1 + int(np.cumprod(widths)[:-1].sum())
    of = [[(), *(u for u, _ in row)] for row in rows]
    probs = torch.tensor(np.array([[q[u] for u in row[:inner]] for row in of]))
    logits = torch.tensor(np.array([[np.log(p[u]) if u in p else np.zeros(vocab) for u in row] for row in of]))
    tree = DraftTree(
        tokens, Topology(parents, len(widths), max(widths)), torch.full_like(tokens, int(law), dtype=torch.uint8), probs
    )
    context: Any = SimpleNamespace(sampling=Sampling(1.0), processors=[()] * len(rows), processed=False)
    flows = LevelVerification(rounds).flows(tree, LogitsLaw(logits, tree, context))
    return float(flows[:, 1:].sum(1) @ torch.tensor([chance for chance, _ in found], dtype=flows.dtype))


def flat(tree: Tree) -> list[tuple[Prefix, int]]:
    """(prefix, index of the parent) of all nodes but the root, depth by depth."""
    nodes: list[tuple[Prefix, int]] = []
    queue: list[tuple[Prefix, int, Tree]] = [((), 0, tree)]
    while queue:
        u, index, below = queue.pop(0)
        for x, _, sub in below:
            nodes.append(((*u, x), index))
            queue.append(((*u, x), len(nodes), sub))
    return nodes


# --- the optimum


def optimum(members: list[tuple[dict[Prefix, int], Laws, Laws]], widths: Prefix, law: Law) -> float:
    """Mean of the most accepted tokens that one verifier, valid for all members, can expect.

    A linear program over the joint chance, given what is seen, to stop at node v and to emit y. Seen are the tree's
    tokens and, by their number, the laws after its inner nodes. In every member every text of `len(widths)` tokens
    must have the target's probability; shorter ones then do, and longer ones are left to the target.
    """
    depth, vocab = len(widths), len(members[0][1][()])
    column: dict[tuple, int] = {}
    seen: dict[tuple, list[tuple[Prefix, int | None]]] = {}
    entries, due, gain = [], [], defaultdict(float)
    for numbers, p, q in members:
        texts = {u: len(due) + i for i, u in enumerate(itertools.product(range(vocab), repeat=depth))}
        due += [float(np.prod([p[u[:i]][u[i]] for i in range(depth)])) for u in texts]
        for nodes, chance in merged(q, widths, law).items():
            key = (nodes, tuple(sorted((u, numbers[u]) for u in nodes if u in numbers)))
            stops = [(v, y) for v in nodes for y in ([None] if len(v) == depth else range(vocab))]
            for v, y in seen.setdefault(key, stops):
                at = column.setdefault((key, v, y), len(column))
                gain[at] -= chance * len(v) / len(members)
                start = v if y is None else (*v, y)
                for rest in itertools.product(range(vocab), repeat=depth - len(start)):
                    u = (*start, *rest)
                    follows = np.prod([p[u[:i]][u[i]] for i in range(len(start), depth)])
                    entries.append((texts[u], at, chance * follows))
    for key, stops in seen.items():
        entries += [(len(due), column[key, v, y], 1.0) for v, y in stops]
        due.append(1.0)
    rows, columns, values = zip(*entries, strict=True)
    equal = coo_matrix((values, (rows, columns)), (len(due), len(column))).tocsr()
    cost = [gain[i] for i in range(len(column))]
    for method in ("highs", "highs-ipm"):
        solved = linprog(cost, A_eq=equal, b_eq=due, bounds=(0, None), method=method)
        if solved.status == 0:
            return -solved.fun
    raise RuntimeError(f"linear program: {solved.message}")


def merged(q: Laws, widths: Prefix, law: Law) -> dict[tuple[Prefix, ...], float]:
    """The trees by the texts in them: how often a text stands there, and in which order, says nothing more."""
    chances = defaultdict(float)
    for chance, tree in trees(q, widths, law):
        chances[tuple(sorted({(), *(u for u, _ in flat(tree))}))] += chance
    return chances


def family(vocab: int, depth: int, seed: int, near: bool, values: int):
    """All combinations of `values` laws after each prefix but the root, whose laws are fixed."""
    pairs = [pair(vocab, depth, [seed, value], near) for value in range(values)]
    below = list(prefixes(vocab, depth))[1:]
    for combination in itertools.product(range(values), repeat=len(below)):
        numbers = dict(zip(below, combination, strict=True))
        p, q = ({(): pairs[0][i][()], **{u: pairs[m][i][u] for u, m in numbers.items()}} for i in (0, 1))
        yield numbers, p, q


# --- tables


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
    for near, law, (vocab, widths) in itertools.product((False, True), SAMPLED, SETTINGS):
        if law == Law.SAMPLED_THEN_TOP and max(widths) >= vocab:
            continue  # all tokens are drafted
        mean = compare(vocab, widths, law, near)
        gap = mean["optimum"] - mean["traversal"]
        collected = f"{(mean['level 2'] - mean['traversal']) / gap:.0%}" if gap > 1e-6 else "no gap"
        shares = [f"{mean[n]:.4f} ({mean[n] / mean['optimum']:.1%})" if n in mean else "" for n in names[:-1]]
        where = ["near" if near else "independent", law.name, str(vocab), str(widths)]
        yield [*where, *shares, f"{mean['optimum']:.4f}", collected]


def families_table() -> Iterator[list[str]]:
    yield [
        "drafts",
        "law",
        "vocab",
        "widths",
        "laws per context",
        "members",
        "all laws known",
        "laws seen",
        "difference",
    ]
    for near, law, (vocab, widths, values) in itertools.product((False, True), SAMPLED, FAMILIES):
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
