"""How the children of a node were drawn: the four laws, and the two facts about each from which everything else follows.

A law says which children are random, `is_random`, and which siblings' tokens a random child could not be, `is_struck`: the
draft's weights are 0 there. Rules, theory and displays ask these two functions alone. So a fifth law is a member of `Law`, a
clause in each of them, a branch of the verification kernel, and the drawing itself.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Law(IntEnum):
    """How the children of a node were drawn, given all that was drawn before them. With w the draft's weights after the node:

    ===================  ===============================================================  ==========================
    law                  children                                                         a child's token has the law
    ===================  ===============================================================  ==========================
    POINT                chosen before anything is drawn: top-k, n-grams; they differ     certain of that token
    IID                  drawn independently of each other; tokens may repeat             w
    WITHOUT_REPLACEMENT  drawn one after the other; they differ                           w without the elder siblings
    SAMPLED_THEN_TOP     of k, the first is drawn, then come the k - 1 most probable      first: w without the others;
                         tokens of w; they differ                                         others: certain
    PADDING              none: there is no such node (a row has fewer nodes than others)
    ===================  ===============================================================  ==========================

    Laws are normalised: "w" stands for w / sum(w). A node without children says POINT.
    """

    POINT = 0
    IID = 1
    WITHOUT_REPLACEMENT = 2
    SAMPLED_THEN_TOP = 3
    PADDING = 4


def is_random(law: Any, slot: Any) -> Any:
    """Whether the child in place `slot`, counted from 0 among those that exist, was drawn; the others are points.

    Both functions take numbers, arrays and tensors, which broadcast, and the laws of nodes that exist.
    """
    return (law != Law.POINT) & ((law != Law.SAMPLED_THEN_TOP) | (slot == 0))


def is_struck(law: Any, slot: Any, sibling: Any) -> Any:
    """Whether the random child in place `slot` could not have the token of the one in place `sibling`."""
    return ((law == Law.WITHOUT_REPLACEMENT) & (sibling < slot)) | ((law == Law.SAMPLED_THEN_TOP) & (sibling > slot))


def excludes_elders(law: Any) -> Any:
    """Whether a random child could not have the token of one drawn before it."""
    return is_struck(law, 1, 0)
