"""Planted in the rules of the library: one function or formula of a module replaced."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from certificates.cases import Case
from certificates.mutants.mutant import Mutant
from specdec import Law, Sampling
from specdec.rules import (
    BlockVerification,
    KSeq,
    LevelVerification,
    Rule,
    TraversalVerification,
    block,
    kseq,
    traversal,
)
from specdec.rules.level import rule as level
from specdec.rules.residual import residual
from specdec.testing import Table, TabularDrafter, TabularTarget
from specdec.trees import Chain, Widths


def without_weight(reach, p, q):
    """The residual of the target's whole law, where only `reach` of it is owed."""
    return residual(reach, p, q)[0], residual(1, p, q)[1]


def chance_renormalised(reach, p, q):
    """What is left over, taken as a fraction of 1 - reach."""
    total = np.maximum(reach * p - q, 0).sum()
    return (min(1, total / (1 - reach)) if reach < 1 else 1), residual(reach, p, q)[1]


def chance_kept(reach, p, q):
    return reach, residual(reach, p, q)[1]


def uncapped(one, ratio):
    """In place of min(1, ratio)."""
    return ratio


_rest = kseq._rest
_seen: dict[str, Any] = {}


def rho_of_two(p, q, count):
    """Enough for two children, and so exact with the right residual."""
    _seen["q"] = q
    return 2 * kseq._GRID


def rest_ignoring_rho(p, taken, count):
    return _rest(p, np.minimum(p, _seen["q"]), count)


def forgotten(group, slot, hit):
    """A try that fails, and says nothing about the child's token."""


_offered = level._Try.offered


def too_much(self, owed, bound):
    """Four times the mass that the bound on the chance of this try allows."""
    return _offered(self, 4 * owed, bound)


BLOCK, TRAVERSAL, KSEQ = BlockVerification(), TraversalVerification(), KSeq()
LEVEL = {name: LevelVerification(rounds) for name, rounds in (("independent", 2), ("pair", 1))}
_MODULES = {
    "block: product of ratios uncapped": (BLOCK, (block, "min", uncapped)),
    "block: residual without weight": (BLOCK, (block, "residual", without_weight)),
    "block: chance kept": (BLOCK, (block, "residual", chance_kept)),
    "traversal: product of ratios uncapped": (TRAVERSAL, (traversal, "min", uncapped)),
    "traversal: residual without weight": (TRAVERSAL, (traversal, "residual", without_weight)),
    "traversal: chance renormalised": (TRAVERSAL, (traversal, "residual", chance_renormalised)),
    "kseq: rho is one": (KSEQ, (kseq, "_rho", lambda p, q, count: kseq._GRID)),
    "kseq: rho for one child more": (KSEQ, (kseq, "_rest", lambda p, taken, count: _rest(p, taken, count + 1))),
    "kseq: residual of one child": (KSEQ, (kseq, "_rest", lambda p, taken, count: _rest(p, taken, 1))),
    "kseq: residual ignores rho": (KSEQ, (kseq, "_rho", rho_of_two), (kseq, "_rest", rest_ignoring_rho)),
    "level: laws after failures not normalised": (LEVEL["pair"], (level, "_normalised", lambda weights: weights)),
    "level: pair drawn with replacement": (LEVEL["pair"], (level, "_others", lambda weights: 0 * weights + 1)),
    "level: failures forgotten": (LEVEL["independent"], (level._Group, "fail", forgotten)),
    "level: more offered than is owed": (LEVEL["independent"], (level._Try, "offered", too_much)),
}
_SHAPES = {
    BLOCK: Chain(3),
    TRAVERSAL: Widths((1, 2), Law.WITHOUT_REPLACEMENT),
    KSEQ: Widths((1, 2), Law.IID),
    LEVEL["pair"]: Widths((2, 1), Law.WITHOUT_REPLACEMENT),
    LEVEL["independent"]: Widths((2, 1), Law.IID),
}


class Constant(Table):
    """The same law after every text, without rounding: weights are powers of two."""

    def __init__(self, weights):
        super().__init__(len(weights))
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def logits(self, text):
        return self.weights.log()


class ConstantTarget(Constant, TabularTarget):
    pass


def _module_case(rule: Rule) -> Case:
    """A case on which all bugs of `rule` show; on many other tables some of them do not."""
    tree = _SHAPES[rule]
    depth = len(tree.widths)
    return Case(TabularDrafter(Table(3, seed=9), tree), rule, Sampling(0.7), TabularTarget(3, 8), horizon=depth + 1)


def example(rule: Rule) -> Case:
    """The example of block verification's paper: the target's law is (1/3, 2/3), the draft's (2/3, 1/3)."""
    return Case(TabularDrafter(Constant([2, 1]), Chain(2)), rule, target=ConstantTarget([1, 2]))


IN_RULES = [Mutant(name, _module_case(rule), tuple(patches)) for name, (rule, *patches) in _MODULES.items()]
UNCAPPED = Mutant("block: uncapped, on the paper's example", example(BLOCK), ((block, "min", uncapped),))
