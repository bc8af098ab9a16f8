"""Pairs of tables in place of models, and every tree that can be drafted from them, with its probability."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from specdec.laws import Law, child_weights, drafts, normalised

Prefix = tuple[int, ...]
Laws = dict[Prefix, np.ndarray]  # after each prefix, [vocab]
Tree = tuple[tuple[int, np.ndarray, Any], ...]  # of each child: token, the law it was drawn from, its own children
# of a family of pairs: numbers that tell the laws after a text apart, the target's laws, the draft's
Member = tuple[dict[Prefix, int], Laws, Laws]


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
        yield from product(range(vocab), repeat=length)


def family(vocab: int, depth: int, seed: int, near: bool, values: int) -> Iterator[Member]:
    """All combinations of `values` laws after each prefix but the root, whose laws are fixed."""
    pairs = [pair(vocab, depth, [seed, value], near) for value in range(values)]
    below = list(prefixes(vocab, depth))[1:]
    for combination in product(range(values), repeat=len(below)):
        numbers = dict(zip(below, combination, strict=True))
        p, q = ({(): pairs[0][i][()], **{u: pairs[m][i][u] for u, m in numbers.items()}} for i in (0, 1))
        yield numbers, p, q


def draws(q: np.ndarray, count: int, law: Law) -> Iterator[tuple[float, Prefix, list[np.ndarray]]]:
    """(probability, tokens, law of each given the earlier ones) of all sets of siblings."""
    for tokens, chance in drafts(law, q, count).items():
        yield chance, tokens, [normalised(child_weights(law, q, tokens, slot)) for slot in range(count)]


def trees(q: Laws, widths: Prefix, law: Law, u: Prefix = ()) -> list[tuple[float, Tree]]:
    if len(u) == len(widths):
        return [(1.0, ())]
    found = []
    for chance, tokens, laws in draws(q[u], widths[len(u)], law):
        for below in product(*(trees(q, widths, law, (*u, x)) for x in tokens)):
            tree = tuple((x, each, sub) for x, each, (_, sub) in zip(tokens, laws, below, strict=True))
            found.append((chance * math.prod(b for b, _ in below), tree))
    return found


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
