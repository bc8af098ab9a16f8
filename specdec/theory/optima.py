"""How much of a chain or a tree the best verifier accepts, on toy models: all texts are enumerated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from specdec.checks import as_int, as_ints, check_callable
from specdec.laws import Law, as_law, drafts
from specdec.theory.ceilings import normalised

TextLaw = Callable[[tuple[int, ...]], ArrayLike]  # the law [vocab] of the token after a text


def chain_optimum(target: TextLaw, draft: TextLaw, depth: int, prompt: Sequence[int] = ()) -> float:
    """The largest expected acceptance length of any lossless verifier of one drafted path: that of block verification.

    A path that ends at its i-th token is accepted as a whole with probability reach_i = min(1, reach_i-1 p / q), and
    drafting on does not change the law of what was accepted: so at least i tokens are with probability E reach_i. Sun et
    al., arXiv:2403.10444, show that this is optimal. Enumerates vocab ** depth texts.

    Args:
        target, draft: laws after any text.
        depth: length of the path.
    """

    depth, prompt = as_int("depth", depth, 0), as_ints("prompt", prompt)
    _check_laws(target, draft)

    def accepted(text: tuple[int, ...], reach: float) -> float:
        if reach == 0 or len(text) - len(prompt) == depth:
            return 0.0
        p, q = normalised(target(text)), normalised(draft(text))
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
    _check_laws(target, draft)
    prompt, widths = as_ints("prompt", prompt), as_ints("widths", widths, 1)
    trees = _draft_trees(draft, prompt, widths, as_law(law))
    mass, gain, entries = _program(target, trees, prompt)
    rows = {equation: i for i, equation in enumerate(mass)}
    values, at = zip(*((value, (rows[equation], column)) for equation, column, value in entries), strict=True)
    matrix = coo_array((values, tuple(zip(*at, strict=True))), shape=(len(mass), len(gain)))
    found = linprog(-np.array(gain), A_eq=matrix.tocsr(), b_eq=list(mass.values()))
    if found.status != 0:
        raise RuntimeError(f"The linear program was not solved: {found.message}")
    return 1 - found.fun


def _check_laws(target: TextLaw, draft: TextLaw) -> None:
    for name, law in (("target", target), ("draft", draft)):
        check_callable(name, law, "pass a function from a text to the law of its next token")


def _program(target: TextLaw, trees: dict[frozenset, float], prompt: tuple[int, ...]):
    """(right-hand side by equation, gain of every unknown, entries (equation, unknown, coefficient)) of `tree_optimum`."""
    law = cache(lambda text: normalised(target((*prompt, *text))))
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
    for children, probability in drafts(law, normalised(draft(text)), widths[0]).items():
        for subtrees in product(*(below(x).items() for x in children)):
            paths = [{(x,), *((x, *path) for path in tree)} for x, (tree, _) in zip(children, subtrees, strict=True)]
            tree = frozenset().union(*paths)
            found[tree] = found.get(tree, 0) + probability * float(np.prod([chance for _, chance in subtrees]))
    return found
