"""Random draft trees of every law, to compare implementations of a rule on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from specdec import DraftTree, Law, Topology
from specdec.laws import SAMPLED


def differing(fast, slow) -> torch.Tensor:
    """[batch] bool: rows in which two decisions differ."""
    depth = min(fast.path.shape[1], slow.path.shape[1])
    kept = torch.arange(depth) <= slow.accepted[:, None]
    elsewhere = ((fast.path[:, :depth] != slow.path[:, :depth]) & kept).any(1)
    return (fast.accepted != slow.accepted) | (fast.token != slow.token) | elsewhere


def random_trees(
    rows: int, vocab: int, seed: int, width: int = 3, laws: Sequence[Law] = (Law.POINT, *SAMPLED)
) -> tuple[DraftTree, torch.Tensor]:
    """Ragged trees of these laws, with padding and zeros in all laws; the target's logits."""
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(2, 11))
    parents, tokens = np.full((rows, nodes), -1), rng.integers(0, vocab, (rows, nodes))
    kinds, probs = np.full((rows, nodes), Law.PADDING), rng.dirichlet([0.3] * vocab, (rows, nodes)) + 1e-4
    probs *= rng.uniform(0.5, 2, (rows, nodes, 1))  # drafts need not be normalised
    probs[rng.random(probs.shape) < 0.4] = 0
    probs[:, :, : width + 1] += 0.01  # enough tokens for all siblings
    depth = 0
    for b in range(rows):
        kinds[b, : rng.integers(1, nodes + 1)] = Law.POINT
        depths = [0] * nodes
        for i in range(1, nodes):
            free = [v for v in range(i) if (parents[b, :i] == v).sum() < width]
            parents[b, i] = rng.choice(free)
            depths[i] = depths[parents[b, i]] + 1
            if kinds[b, parents[b, i]] == Law.PADDING or rng.random() < 0.1:
                kinds[b, i] = Law.PADDING
        depth = max(depth, *depths)
        for v in range(nodes):
            children = np.flatnonzero(parents[b] == v)
            children = children[kinds[b, children] != Law.PADDING]
            if kinds[b, v] != Law.PADDING:  # a leaf too: its children may have been struck out by a budget
                kinds[b, v] = rng.choice(laws)
            if len(children):
                tokens[b, children] = drawn(rng, Law(kinds[b, v]), probs[b, v], len(children))
    logits = np.log(probs + 1e-3) + rng.normal(0, 1, probs.shape)
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    logits[..., 0] = 0
    topology = Topology(torch.from_numpy(parents), depth, width)
    laws_ = torch.from_numpy(kinds).to(torch.uint8)
    return DraftTree(torch.from_numpy(tokens), topology, laws_, torch.from_numpy(probs)), torch.from_numpy(logits)


def drawn(rng, law: Law, weights: np.ndarray, count: int) -> np.ndarray:
    weights = weights / weights.sum()
    if law == Law.IID:
        return rng.choice(len(weights), count, p=weights)
    if law == Law.WITHOUT_REPLACEMENT:
        return rng.choice(len(weights), count, replace=False, p=weights)
    if law == Law.POINT:
        return rng.choice(len(weights), count, replace=False)
    top = np.argsort(-weights)[: count - 1]
    rest = np.where(np.isin(np.arange(len(weights)), top), 0, weights)
    return np.array([rng.choice(len(weights), p=rest / rest.sum()), *top])
