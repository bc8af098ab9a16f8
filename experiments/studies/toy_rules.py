"""The accepted tokens that a rule expects of drafted trees, from its definition and without coins; of all trees, or of one."""

from __future__ import annotations

import numpy as np
import torch

from experiments.studies.toy_trees import Laws, Prefix, Tree, flat
from specdec import DraftTree, Sampling
from specdec.batch import Batch
from specdec.laws import Law
from specdec.rules import LevelVerification
from specdec.rules.residual import residual
from specdec.target_law import LogitsLaw
from specdec.tree import Topology


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
    batch = Batch(len(rows), 1, vocab, torch.device("cpu"))
    batch.sampling = Sampling(1.0)
    flows = LevelVerification(rounds).flows(tree, LogitsLaw(logits, tree, batch))
    return float(flows[:, 1:].sum(1) @ torch.tensor([chance for chance, _ in found], dtype=flows.dtype))
