"""A text that the target wrote, and where the steps of any tree and rule would begin in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.checks import as_tuple, check_kind
from specdec.coins import Coins
from specdec.laws import Law, excludes_elders
from specdec.rules import BlockVerification, Rule, SiblingRejection, TraversalVerification
from specdec.rules.residual import residual
from specdec.sampling import Sampling
from specdec.tree import DraftTree, RowTree, Topology
from specdec.trees import Static, Widths
from specdec.trees.draw import draw

# for each rule, whether it enters a child only after accepting it
_ACCEPTING: dict[type[Rule], bool] = {SiblingRejection: True, BlockVerification: False, TraversalVerification: False}


class NotForetold(ValueError):
    """The steps of such a run do not follow from what is known of a text; the message says why, and what to do."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text that the target wrote, and the laws before each of its tokens.

    Args:
        tokens: the new tokens.
        target: [place, vocab]: the target's laws.
        draft: [place, vocab]: the draft's logits; [depth, place, vocab] if they depend on how many drafts came before.
        sampling: how the text was sampled.
    """

    tokens: list[int]
    target: Tensor
    draft: Tensor
    sampling: Sampling
    # what trees have in common, which is computed once for all of them
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def starts(self, tree: Static | Widths, rule: Rule) -> np.ndarray:
        """[place]: the chance, given the text, that a step begins there in a run that drafts such trees.

        Args:
            tree: trees of one shape; siblings are drawn WITHOUT_REPLACEMENT in chains only.
            rule: sibling rejection, block or traversal verification.
        """
        check_kind("tree", tree, (Static, Widths), "give a tree of one shape: Static, Widths or Chain")
        parents, law = tree.parents, tree.law
        self._check(tree, rule)
        children = [[child for child, parent in enumerate(parents) if parent == node] for node in range(len(parents))]
        places, accepting = len(self.tokens), _ACCEPTING[type(rule)]
        begins = np.zeros(places + len(parents))
        begins[0] = 1
        for start in range(places):
            survival = [1.0]
            # (node, chance that it is drafted and entered, chance that it or something below is then accepted)
            states = [(0, 1.0, 1.0)]
            for place in range(start, places):
                states = [
                    (children[node][slot], weight * chance, within)
                    for node, weight, reach in states
                    if (width := len(children[node]))
                    for slot, chance, within in self._entered(place, reach, law, width, place - start, accepting)
                ]
                if not states:
                    break
                survival.append(sum(weight * reach for _, weight, reach in states))
            begins[start + 1 : start + 1 + len(survival)] -= begins[start] * np.diff([*survival, 0])
        return begins[:places]

    def chances(self, place: int, law: Law, width: int, depth: int = 0) -> list[tuple[int, float]]:
        """(slot, chance given the text) of the children at a place that sibling rejection may accept as the text's token.

        Args:
            place: of the token.
            law: how so many siblings are drawn.
            depth: how many drafts came before, if the draft's laws depend on it.
        """
        return [
            (slot, drafted * accepted)
            for slot, drafted, accepted in self._entered(place, 1.0, law, width, depth, accepting=True)
        ]

    def _check(self, tree: Static | Widths, rule: Rule) -> None:
        """Raise `NotForetold` unless the steps of such a run follow from what is known of this text."""
        check_kind("rule", rule, Rule)
        spec = tree.spec(self.sampling)
        if type(rule) not in _ACCEPTING:
            names = ", ".join(known.__name__ for known in _ACCEPTING)
            raise NotForetold(f"{type(rule).__name__}: acceptance can be predicted for {names} only; run it instead.")
        if spec.width > 1 and any(excludes_elders(each) for each in spec.laws):
            raise NotForetold(
                f"law={tree.law.name}: the law owed after a child failed depends on its token, which is not in the text; "
                "use SAMPLED_THEN_TOP, IID or POINT, or run it."
            )
        rule.check(spec)
        if self.draft.dim() == 3 and spec.depth > len(self.draft):
            raise NotForetold(
                f"{tree} is {spec.depth} deep, and the draft's laws are known to depth {len(self.draft)}; use a tree no "
                f"deeper, or, if it is no block that ends there, texts(..., depth={spec.depth})."
            )

    def _entered(
        self, place: int, reach: float, law: Law, width: int, depth: int, accepting: bool
    ) -> list[tuple[int, float, float]]:
        """(slot, chance to be drafted and entered, chance to be then accepted) of children with the text's token."""
        depth = depth if self.draft.dim() == 3 else 0
        key = place, reach, law, width, depth, accepting
        if key not in self._known:
            self._known[key] = [*self._children(place, reach, self._forest(law, width, depth), width, accepting)]
        return self._known[key]

    def _children(
        self, place: int, reach: float, forest: RowTree, width: int, accepting: bool
    ) -> Iterator[tuple[int, float, float]]:
        x, p, turn = self.tokens[place], self._laws[place], 1.0
        own = p[x]
        for child, q in forest.draws(place, len(p)):
            taken = np.minimum(reach * p, q)
            if taken[x] > 0:
                slot, entered = (child - len(self.tokens)) % width, taken[x] if accepting else q[x]
                yield slot, turn * entered / own, taken[x] / entered
            turn *= 1 - taken.sum()
            reach, p = residual(reach, p, q)

    @cached_property
    def _laws(self) -> np.ndarray:
        """[place, vocab] float64: the target's laws."""
        return self.target.double().numpy(force=True)

    def _forest(self, law: Law, width: int, depth: int) -> RowTree:
        """One row with a root for every place, numbered like it, and the children drawn at each; they follow in order."""
        key = law, width, depth
        if key not in self._known:
            places = len(self.tokens)
            coins = Coins(0, 1, places * (1 + width))
            logits = self.draft[depth] if self.draft.dim() == 3 else self.draft
            drawn = draw(logits[None], width, law, self.sampling, coins, places)
            parents = torch.cat([torch.full((places,), -1), torch.arange(places).repeat_interleave(width)])
            leaves = torch.zeros_like(drawn.tokens, dtype=torch.uint8)
            if drawn.exists is not None:
                leaves.masked_fill_(~drawn.exists, Law.PADDING)
            tokens = torch.cat([drawn.tokens.new_zeros(1, places), drawn.tokens], 1)
            topology, laws = Topology(parents[None], 1, width), torch.cat([drawn.laws, leaves], 1)
            self._known[key] = DraftTree(tokens, topology, laws, drawn.draft_probs).row(0)
        return self._known[key]


def acceptance_length(texts: Sequence[Text], tree: Static | Widths, rule: Rule = SiblingRejection()) -> float:
    """Tokens per expected step, as in `Trace.summary`; arguments as for `Text.starts`."""
    texts = as_tuple("texts", texts, "texts, as from specdec.prediction.texts")
    if not texts:
        raise ValueError("texts=[]: must be at least one.")
    for i, text in enumerate(texts):
        check_kind(f"texts[{i}]", text, Text)
    return sum(len(text.tokens) for text in texts) / sum(float(text.starts(tree, rule).sum()) for text in texts)
