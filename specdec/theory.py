"""What the best verifier, tree and machine would give: ceilings of acceptance, optima of toy models, a cost model.

>>> specdec.theory.one_step_ceiling(p, Law.IID, q, count=4)  # no verifier accepts one of 4 children more often
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np
import torch
from numpy.typing import ArrayLike
from transformers import PreTrainedModel

from specdec.divergence import divergence
from specdec.record import Record
from specdec.rules.rule import Rule
from specdec.target import CachedModel
from specdec.trace import Trace, Visit
from specdec.tree import Law, RowTree, chain

TextLaw = Callable[[tuple[int, ...]], ArrayLike]  # the law [vocab] of the token after a text

_STEP = 0.1  # of the double exponential quadrature: its error is below 1e-12
_DECAY = 40.0  # exp(-40) < 1e-17: where integrands are cut off


def one_step_ceiling(
    p: ArrayLike, law: Law, q: ArrayLike | None = None, *, count: int = 1, top: Sequence[int] = ()
) -> float:
    """The largest probability with which a lossless verifier can accept one of the children of a node.

    A verifier couples the children with a token of law p, and accepts when that token is one of them. By max-flow =
    min-cut the best coupling does so with probability min over sets H of tokens of 1 + p(H) - Pr[all children in H]
    (optimal transport: Sun et al., arXiv:2310.15141; its dual: Hu et al., arXiv:2502.18779). In closed form:

    - POINT: p(children).
    - SAMPLED_THEN_TOP: Pr is r(H - top) if H holds the top and 0 otherwise, r being q outside the top, so that the
      minimum is p(top) + sum min(p, r) outside. Sibling rejection has this value.
    - IID: Pr = q(H)^count is convex in q(H): against its tangent at the best H, a set {p < c q} is as good. So H may be
      sought among the prefixes of the tokens sorted by p / q: O(V log V).
    - WITHOUT_REPLACEMENT: prefixes too (see `_all_among_first`, which evaluates Pr for all of them in O(V count G) with
      some G = 200 points of quadrature: 0.1 to 0.2 s for 4,096 tokens).

    Args:
        p: [vocab] the target's law at the node.
        law: how the children are drawn.
        q: [vocab] the draft's law at the node; not needed for POINT. Both are normalised here.
        count: number of children, for IID and WITHOUT_REPLACEMENT.
        top: tokens of the children that are not random: all of them for POINT, all but the first for SAMPLED_THEN_TOP.
    """
    p, law, top = _normalised(p), Law(law), sorted(set(top))
    if law == Law.POINT:
        return float(p[top].sum())
    if q is None or law == Law.PADDING:
        raise ValueError(f"law={law.name}, q={q}: give a sampled law and q, the law that the children are drawn from.")
    q = _normalised(q)
    if law == Law.SAMPLED_THEN_TOP:
        q[top] = 0
        both = np.minimum(p, _normalised(q))
        return float(p[top].sum() + both.sum())
    drawn = np.flatnonzero(q)
    order = drawn[np.argsort(p[drawn] / q[drawn], kind="stable")]
    inside = np.cumsum(q[order]) ** count if law == Law.IID else _all_among_first(q[order], count)
    return float(1 + min(0, np.min(np.cumsum(p[order]) - inside)))


def _all_among_first(q: np.ndarray, count: int) -> np.ndarray:
    """[n]: for every i, the probability that `count` draws from q [n] > 0, without replacement, are all among q[:i + 1].

    Let every token arrive at a time of its own, exponential with rate q: they arrive in the order of drawing without
    replacement. With r = 1 - q(H), the rate of those outside H, the first of whom comes at time t with density
    r exp(-r t), the draws are not all in H when fewer than `count` of H have come by then: the count of independent
    events, which is extended token by token. The integrand falls like exp(-t q_count) or faster, q_count being the
    `count`-th largest q: either H lacks one of the largest, and r >= q_count, or it has them all.

    Why prefixes by p / q suffice: let H be best, i in H, j outside. Let s be the time by which count - 1 others of H have
    come, u when count have, T when the first outsider other than j does. Then F(H) - F(H - i), that i is drawn and all are
    in H, needs s < T, i before u and T, j after both s and i. By the density of i's time t, over q_i it is
    exp(-q_i t - q_j max(s, t)) where t < min(u, T). F(H + j) - F(H), that j is drawn and all are in H + j, over
    q_j has for t > s the same density from the cases in which i comes later, and for t < s at least exp(-q_j t) >=
    exp(-q_j s), whether i comes before s or after. So (F(H + j) - F(H)) / q_j >= (F(H) - F(H - i)) / q_i; and H being
    best, p_j is at least the first numerator and p_i at most the second: p_j / q_j >= p_i / q_i, and where they are equal
    H + j is as good.
    """
    count = min(count, len(q))
    end = np.log(_DECAY / np.partition(q, -count)[-count])
    s = np.arange(-np.log(_DECAY), end + _STEP, _STEP)
    time = np.exp(s - np.exp(-s))
    weight = _STEP * time * (1 + np.exp(-s))
    outside = np.append(np.cumsum(q[:0:-1])[::-1], 0)
    come = np.zeros((count, len(time)))  # come[j]: the probability that exactly j of the prefix have come
    come[0], missed = 1, np.empty(len(q))
    for i, (rate, other) in enumerate(zip(q, outside, strict=True)):
        late = np.exp(-rate * time)
        come[1:] = come[1:] * late + come[:-1] * (1 - late)
        come[0] *= late
        missed[i] = other * (weight * np.exp(-other * time)) @ come.sum(0)
    return 1 - missed


def chain_optimum(target: TextLaw, draft: TextLaw, depth: int, prompt: Sequence[int] = ()) -> float:
    """The largest expected acceptance length of any lossless verifier of one drafted path: that of block verification.

    A path that ends at its i-th token is accepted as a whole with probability reach_i = min(1, reach_i-1 p / q), and
    drafting on does not change the law of what was accepted: so at least i tokens are with probability E reach_i. Sun et
    al., arXiv:2403.10444, show that this is optimal. Enumerates vocab ** depth texts.

    Args:
        target, draft: laws after any text.
        depth: length of the path.
    """

    def accepted(text: tuple[int, ...], reach: float) -> float:
        if reach == 0 or len(text) - len(prompt) == depth:
            return 0.0
        p, q = _normalised(target(text)), _normalised(draft(text))
        ahead = {int(x): min(1.0, reach * p[x] / q[x]) for x in np.flatnonzero(q)}
        return sum(q[x] * (r + accepted((*text, x), r)) for x, r in ahead.items())

    return 1 + accepted(tuple(prompt), 1.0)


def tree_optimum(target: TextLaw, draft: TextLaw, widths: Sequence[int], law: Law, prompt: Sequence[int] = ()) -> float:
    """An upper bound on the expected acceptance length of every lossless verifier of a tree, by linear programming.

    Unknown are a(T, s), the mass of draft tree T that is accepted up to path s, and b(s, y), the mass that then emits
    y: every tree is used up, sum_s a(T, s) = Pr T; what is accepted is followed, sum_y b(s, y) = sum_T a(T, s); and
    every text u is emitted, or continued by the target, as often as the target writes it: sum over s that begin with u
    and T of a(T, s) + sum over beginnings v of u of b(v without its last token, that token) P(u | v) = P(u).

    Caution: what this verifier does may depend on both models' laws at texts outside the tree, which no rule ever sees.
    So a gap to it is not known to be closable, but on chains, where it is `chain_optimum`, and on single nodes, where it is
    1 + `one_step_ceiling`. For toys: all draft trees are enumerated.

    Args:
        target, draft: laws after any text.
        widths: children of every node by depth, as in `specdec.trees.Widths`.
        law: how they are drawn.
    """
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError as error:
        raise ImportError("tree_optimum solves a linear program: pip install 'specdec[experiments]'") from error
    trees = _draft_trees(draft, tuple(prompt), tuple(widths), law)
    mass, gain, entries = _program(target, trees, tuple(prompt))
    rows = {equation: i for i, equation in enumerate(mass)}
    values, at = zip(*((value, (rows[equation], column)) for equation, column, value in entries), strict=True)
    matrix = coo_array((values, tuple(zip(*at, strict=True))), shape=(len(mass), len(gain)))
    found = linprog(-np.array(gain), A_eq=matrix.tocsr(), b_eq=list(mass.values()))
    if found.status != 0:
        raise RuntimeError(f"The linear program was not solved: {found.message}")
    return 1 - found.fun


def _program(target: TextLaw, trees: dict[frozenset, float], prompt: tuple[int, ...]):
    """(right-hand side by equation, gain of every unknown, entries (equation, unknown, coefficient)) of `tree_optimum`."""
    law = cache(lambda text: _normalised(target((*prompt, *text))))
    paths = sorted(frozenset().union([()], *trees))
    texts = [(*path, y) for path in paths for y in range(len(law(())))]  # longer ones follow from these

    def chance(text: tuple, start: int) -> float:
        return float(np.prod([law(text[:i])[text[i]] for i in range(start, len(text))]))

    mass = {("tree", tree): probability for tree, probability in trees.items()}
    mass |= {("stop", path): 0.0 for path in paths} | {("text", text): chance(text, 0) for text in texts}
    gain, entries = [], []
    for tree in trees:
        for path in {(), *tree}:
            begins = [("text", path[: i + 1]) for i in range(len(path))]
            entries += [(equation, len(gain), 1) for equation in [("tree", tree), *begins]]
            entries.append((("stop", path), len(gain), -1))
            gain.append(len(path))
    for emitted in texts:
        entries.append((("stop", emitted[:-1]), len(gain), 1))
        begun = [text for text in texts if text[: len(emitted)] == emitted]
        entries += [(("text", text), len(gain), chance(text, len(emitted))) for text in begun]
        gain.append(0)
    return mass, gain, entries


def _draft_trees(draft: TextLaw, text: tuple[int, ...], widths: tuple[int, ...], law: Law) -> dict[frozenset, float]:
    """{the drafted paths below `text`: probability}, for every tree that may be drawn."""
    if not widths:
        return {frozenset(): 1.0}
    found: dict[frozenset, float] = {}
    below = cache(lambda x: _draft_trees(draft, (*text, x), widths[1:], law))
    for children, probability in _draws(_normalised(draft(text)), widths[0], law).items():
        for subtrees in product(*(below(x).items() for x in children)):
            paths = [{(x,), *((x, *path) for path in tree)} for x, (tree, _) in zip(children, subtrees, strict=True)]
            tree = frozenset().union(*paths)
            found[tree] = found.get(tree, 0) + probability * float(np.prod([chance for _, chance in subtrees]))
    return found


def _draws(q: np.ndarray, count: int, law: Law) -> dict[tuple[int, ...], float]:
    """{children in the order they are drawn: probability}; fewer than `count` where the support runs out."""
    support = np.flatnonzero(q).tolist()
    if law == Law.IID:
        return {xs: float(np.prod(q[list(xs)])) for xs in product(support, repeat=count)}
    if law == Law.WITHOUT_REPLACEMENT:
        orders = permutations(support, min(count, len(support)))
        left = {xs: [sum(q[x] for x in support if x not in xs[:j]) for j in range(len(xs))] for xs in orders}
        return {xs: float(np.prod(q[list(xs)] / weights)) for xs, weights in left.items()}
    best = np.argsort(-q, kind="stable").tolist()
    top = [x for x in best[: count - (law == Law.SAMPLED_THEN_TOP)] if q[x] > 0]
    rest = [x for x in support if x not in top] if law == Law.SAMPLED_THEN_TOP else []
    return {(x, *top): q[x] / q[rest].sum() for x in rest} or {tuple(top): 1.0}


def _normalised(weights: ArrayLike) -> np.ndarray:
    law = np.array(weights, dtype=np.float64)
    if not (law.ndim == 1 and (law >= 0).all() and 0 < law.sum() < np.inf):
        raise ValueError("A law is a vector of finite non-negative weights [vocab], not all of them 0.")
    return law / law.sum()


def positional_acceptance(trace: Trace) -> list[list[float]]:
    """[depth][slot]: how often the child in that place was accepted where its parent was, from a trace="ceiling".

    Siblings exclude each other, so that the sum over slots is the chance to get one level deeper. With sampled laws the
    figures hold for the widths that they were recorded with: where a child stands says how it was drawn.
    """
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


def expected_length(parents: Sequence[int], acceptance: Sequence[Sequence[float]]) -> float:
    """The expected acceptance length of a tree: the sum over its nodes of the chance that the path to them is accepted.

    Args:
        parents: [node] of every node, -1 for the root; parents precede children, siblings in the order they are drawn.
        acceptance: [depth][slot], as from `positional_acceptance`, taken to be independent from depth to depth.
    """
    depth, chance, children = [0], [1.0], [0] * len(parents)
    for node, parent in enumerate(parents[1:], 1):
        level, slot = (acceptance[depth[parent]] if depth[parent] < len(acceptance) else ()), children[parent]
        if slot >= len(level) and chance[parent] > 0:
            raise ValueError(
                f"Node {node} is child {slot} at depth {depth[parent]}, where acceptance is not known: record a larger "
                "tree, or ask for a smaller one."
            )
        chance.append(chance[parent] * level[slot] if slot < len(level) else 0.0)
        depth.append(depth[parent] + 1)
        children[parent] += 1
    return sum(chance)


@dataclass(frozen=True)
class CostCurve:
    """Measured times of a forward pass; straight lines between the measurements."""

    nodes: Sequence[int]  # increasing
    seconds: Sequence[float]

    def __call__(self, nodes: int) -> float:
        """Seconds of a forward pass over this many nodes per row."""
        if not self.nodes[0] <= nodes <= self.nodes[-1]:
            raise ValueError(
                f"{nodes} nodes: costs were measured from {self.nodes[0]} to {self.nodes[-1]}; measure more."
            )
        return float(np.interp(nodes, self.nodes, self.seconds))


@dataclass(frozen=True)
class Costs:
    """What a step costs, in seconds."""

    verify: CostCurve  # the target's forward pass, by nodes of the tree
    draft: CostCurve | None = None  # the draft model's, by nodes of a level; None if drafting is free
    other: CostCurve | None = None  # the loop's own time, by nodes of the tree; None if it is not counted

    def step(self, parents: Sequence[int]) -> float:
        """Draft the tree level by level (each level with children is one forward pass), verify it at once."""
        depth, levels = [0], {}
        for parent in parents[1:]:
            depth.append(depth[parent] + 1)
        for node in set(parents[1:]):
            levels[depth[node]] = levels.get(depth[node], 0) + 1
        drafting = sum(map(self.draft, levels.values())) if self.draft is not None else 0.0
        own = self.other(len(parents)) if self.other is not None else 0.0
        return drafting + self.verify(len(parents)) + own


def measure_costs(
    target: PreTrainedModel,
    draft: PreTrainedModel | None = None,
    *,
    nodes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    context: int = 128,
    batch: int = 1,
    repeats: int = 15,
) -> Costs:
    """Median times of the forward passes that the loop makes, over interleaved rounds.

    Args:
        draft: the draft model; None where drafting costs next to nothing, as with n-grams.
        nodes: sizes to measure; between them times are interpolated.
        context: tokens in the cache of every row.
        batch: rows.
        repeats: rounds, after one that is not counted.
    """
    sizes = sorted({1, *nodes})
    forwards = [_forward(model, sizes[-1], context, batch) for model in (target, draft) if model is not None]
    times = [[[forward(size) for size in sizes] for forward in forwards] for _ in range(repeats + 1)][1:]
    medians = np.median(times, axis=0).tolist()  # [model][size]
    curves = [CostCurve(tuple(sizes), tuple(seconds)) for seconds in medians]
    return Costs(*curves)


def _forward(model: PreTrainedModel, most: int, context: int, batch: int) -> Callable[[int], float]:
    """(nodes) -> seconds of one forward pass of a chain of that many after `context` tokens."""
    cached = CachedModel(model)
    tokens = torch.arange(context + most, device=cached.device).remainder(cached.vocab).expand(batch, -1)
    with torch.inference_mode(), cached.patch:
        cached.start(batch, context + most)
        cached.read(tokens, [context] * batch)

    def forward(nodes: int) -> float:
        with torch.inference_mode(), cached.patch:
            _finish(cached.device)
            began = time.perf_counter()
            cached.forward(tokens[:, :nodes], chain(batch, nodes, cached.device))
            _finish(cached.device)
            return time.perf_counter() - began

    return forward


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def predicted_speed_up(acceptance_length: float, parents: Sequence[int], costs: Costs) -> float:
    """Over drafting nothing: acceptance length x t(1) / t(step). What is measured falls short of it by the loop's own time."""
    return acceptance_length * costs.step([-1]) / costs.step(parents)


def chain_speed_ups(rates: Sequence[float], costs: Costs) -> list[float]:
    """The predicted speed-ups of chains of 0, 1, ... drafted tokens.

    Args:
        rates: acceptance rate by depth, as in `Trace.summary`. No longer chain is considered.
    """
    chains = [list(range(-1, length)) for length in range(len(rates) + 1)]
    return [predicted_speed_up(expected_length(c, [[rate] for rate in rates]), c, costs) for c in chains]


def best_chain_length(rates: Sequence[float], costs: Costs) -> int:
    """The number of drafted tokens with the largest of the `chain_speed_ups`; 0: drafting does not pay."""
    return int(np.argmax(chain_speed_ups(rates, costs)))


def best_tree(acceptance: Sequence[Sequence[float]], costs: Costs, nodes: int = 32) -> list[int]:
    """The parents of the tree with the largest predicted speed-up, the root alone if drafting does not pay.

    For every depth and number of nodes the longest expected acceptance (by dynamic programming as in Sequoia,
    arXiv:2402.12374, here with acceptance by depth), and of those trees the fastest by the measured times.

    Args:
        acceptance: [depth][slot], as from `positional_acceptance`. No deeper or wider tree is considered.
        nodes: the most nodes, the root included.
    """
    depths = range(len(acceptance) + 1)
    trees = [[-1], *(tree for depth in depths for tree in _longest(acceptance[:depth], nodes))]
    return max(trees, key=lambda tree: predicted_speed_up(expected_length(tree, acceptance), tree, costs))


def longest_tree(acceptance: Sequence[Sequence[float]], nodes: int) -> list[int]:
    """The parents of the tree of so many nodes with the longest expected acceptance, whatever they cost.

    Args:
        acceptance: [depth][slot], as from `positional_acceptance`. No deeper or wider tree is considered.
        nodes: the root included.
    """
    return _longest(acceptance, nodes)[-1]


def _longest(acceptance: Sequence[Sequence[float]], nodes: int) -> list[list[int]]:
    """For up to `nodes` nodes each, the parents of the tree of largest expected acceptance length."""

    @cache
    def best(depth: int, slot: int, left: int) -> tuple[float, int]:
        """What `left` nodes are worth as children from `slot` on, with all below; how many go to the first of them."""
        if depth == len(acceptance) or slot == len(acceptance[depth]):
            return 0.0, 0
        chance = acceptance[depth][slot]
        return max(
            (
                (chance * (1 + best(depth + 1, 0, own - 1)[0]) + best(depth, slot + 1, left - own)[0], own)
                for own in range(1, left + 1)
            ),
            default=(0.0, 0),
        )

    def grow(parents: list[int], node: int, depth: int, left: int) -> list[int]:
        slot = 0
        while own := best(depth, slot, left)[1]:
            parents.append(node)
            grow(parents, len(parents) - 1, depth + 1, own - 1)
            slot, left = slot + 1, left - own
        return parents

    return [grow([-1], 0, 0, count) for count in range(nodes)]


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
