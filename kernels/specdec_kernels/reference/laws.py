"""How the children of a node were drawn: the four laws, and the two facts about each from which all else follows.

Rules, theory and displays ask `is_random` and `is_struck`. So a fifth law is a member of `Law`, a clause in each of the two,
a branch of the verification kernel, and the drawing itself, in `specdec.trees`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Law(IntEnum):
    """How the children of a node were drawn, by the weights w [vocab] that the draft gives the tokens after it.

    ===================  =================================================================  ============================
    law                  children                                                           a child's token has the law
    ===================  =================================================================  ============================
    POINT                chosen without a coin, as by top-k or n-grams; they differ         certain of that token
    IID                  drawn independently of each other; tokens may repeat               w
    WITHOUT_REPLACEMENT  drawn one after the other; they differ                             w without the elder siblings
    SAMPLED_THEN_TOP     of k, the first is drawn, and the k - 1 most probable tokens       w without the others;
                         follow; they differ                                                of the others: certain
    PADDING              none: there is no such node, as a row has fewer than the batch
    ===================  =================================================================  ============================

    A law is its weights over their sum. A node without children says POINT.
    """

    POINT = 0
    IID = 1
    WITHOUT_REPLACEMENT = 2
    SAMPLED_THEN_TOP = 3
    PADDING = 4


def is_random(law: Any, slot: Any) -> Any:
    """Whether the child in place `slot`, counted from 0 among those that exist, was drawn; the others are points.

    All arguments here are numbers, arrays or tensors, which broadcast; `law` is that of a node that exists.
    """
    return (law != Law.POINT) & ((law != Law.SAMPLED_THEN_TOP) | (slot == 0))


def is_struck(law: Any, slot: Any, sibling: Any) -> Any:
    """Whether the random child in place `slot` could not be the token of the one in place `sibling`: its weight is 0 there."""
    return ((law == Law.WITHOUT_REPLACEMENT) & (sibling < slot)) | ((law == Law.SAMPLED_THEN_TOP) & (sibling > slot))


def excludes_elders(law: Any) -> Any:
    """Whether a random child could not be the token of one drawn before it."""
    return is_struck(law, 1, 0)
