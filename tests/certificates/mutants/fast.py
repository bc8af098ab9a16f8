"""Faults of batched code that its certificate must find: those that it had, and others."""

from __future__ import annotations

import torch

from certificates.fast_cases import FastCase
from certificates.mutants.mutant import Mutant
from specdec import Law, Sampling, sampling
from specdec.rules import (
    BlockVerification,
    KSeq,
    LevelVerification,
    SiblingRejection,
    TraversalVerification,
    block,
    children,
    kseq,
    traversal,
)
from specdec.rules.level import batch as level_batch
from specdec.testing.hard_laws import AS_DRAWN, IN_BFLOAT16, UNDERFLOW
from specdec_kernels.reference import law, verify

_divide, _probabilities = level_batch._divide, sampling.probabilities


def in_float32(a, b):
    """What is left for the second of a pair overflows in the denominator."""
    return _divide(a.float(), b.float()).to(a.dtype)


def in_their_own_dtype(siblings):
    """Weights of 16 bits are normalised in 16 bits."""
    internal = siblings._node.clamp(max=siblings._tree.draft_probs.shape[1] - 1)
    return siblings._tree.draft_probs[siblings._rows, internal]


def of_the_logit(logits, temperature, *filters):
    """The temperature divides the logit, not its distance from the peak."""
    return _probabilities(logits / temperature, 1.0, *filters)


def without_reach(reach, p, rest):
    """What is owed after a rejection, as if the node had been reached for certain."""
    total = rest.sum(1, keepdim=True)
    return total, torch.where(total > 0, rest / total.where(total > 0, 1), p)


def stays_owed(reach, p, rest):
    """Nothing is taken off after a rejection."""
    return reach, p


_reject = verify._Owed._reject


def first_three(owed, j, where, total):
    """From the fourth draw on its law is not taken off when it is rejected."""
    if j < 3:
        _reject(owed, j, where, total)


_IID, _WITHOUT, _TOP = Law.IID, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP


def _case(rule, kind, width=2, vocab=3, temperature=1.0, dtype=torch.float32, weights=AS_DRAWN) -> FastCase:
    return FastCase(rule, vocab, kind, width, Sampling(temperature), dtype, weights)


_OVERFLOW = (verify, "_unit", torch.ones_like)
_HALF = (children.Siblings, "weights", property(in_their_own_dtype))
_AS_REACHED = (traversal, "residual_batch", without_reach)
_RHO = (kseq, "_rho_batch", lambda p, child, count, width: 0 * count + kseq._GRID)
_TIES = (law, "_in_nucleus", lambda scores, probs, top_p: probs >= law._nucleus_threshold(probs.float(), top_p))
FAST = [
    Mutant(
        "siblings: the fourth draw stays owed",
        _case(SiblingRejection(), _IID, 5),
        ((verify._Owed, "_reject", first_three),),
    ),
    Mutant(
        "near ties are ties to a filter",
        FastCase(SiblingRejection(), 3, _IID, 2, Sampling(0.7, top_p=0.6), torch.float32),
        (_TIES,),
    ),
    Mutant("siblings: weights not in units, the first sampled", _case(SiblingRejection(), _TOP), (_OVERFLOW,)),
    Mutant("siblings: weights not in units, no replacement", _case(SiblingRejection(), _WITHOUT), (_OVERFLOW,)),
    Mutant("siblings: the same, of least numbers", _case(SiblingRejection(), _TOP, weights=UNDERFLOW), (_OVERFLOW,)),
    Mutant("level: pairs in float32", _case(LevelVerification(), _WITHOUT), ((level_batch, "_divide", in_float32),)),
    *(
        Mutant(
            f"{name}: weights of 16 bits normalised as they are",
            _case(rule, _IID, width, weights=IN_BFLOAT16),
            (_HALF,),
        )
        for name, rule, width in (
            ("block", BlockVerification(), 1),
            ("traversal", TraversalVerification(), 2),
            ("level", LevelVerification(), 2),
            ("kseq", KSeq(), 2),
        )
    ),
    Mutant(
        "the temperature divides large logits",
        _case(SiblingRejection(), _IID, temperature=0.7),
        ((sampling, "probabilities", of_the_logit),),
    ),
    Mutant("block: nothing taken off", _case(BlockVerification(), _IID, 1), ((block, "residual_batch", stays_owed),)),
    Mutant("traversal: residual as if reached", _case(TraversalVerification(), _IID), (_AS_REACHED,)),
    Mutant("kseq: rho is one", _case(KSeq(), _IID), (_RHO,)),
]
