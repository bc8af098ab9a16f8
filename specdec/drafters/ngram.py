"""Prompt lookup: the text repeats itself, so copy what followed the last time (Saxena 2023; LLMA, arXiv:2304.04487)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from specdec.coins import Coins
from specdec.drafters.drafter import Context, Drafter
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Law, TreeSpec, chain, root_only


@dataclass(frozen=True)
class NgramDrafter(Drafter):
    """Drafts what followed the most recent earlier occurrence of the last tokens, longest match first.

    Args:
        length: most tokens to draft.
        max_ngram: longest match to look for; shorter ones are tried down to a single token.
    """

    length: int = 8
    max_ngram: int = 3

    def __post_init__(self) -> None:
        if self.length < 1 or self.max_ngram < 1:
            raise ValueError(f"{self}: both must be >= 1.")

    def spec(self, sampling: Sampling) -> TreeSpec:
        return TreeSpec(frozenset({Law.POINT}), nodes=self.length + 1, depth=self.length, width=1)

    def propose(self, context: Context, coins: Coins) -> DraftTree:
        text = context.tokens.numpy(force=True)
        length = min(self.length, context.max_depth)
        drafts = [self._lookup(row[:n])[:length] for row, n in zip(text, context.host_lengths, strict=True)]
        nodes = 1 + max(map(len, drafts))
        if nodes == 1:
            return root_only(context.root)
        tokens = np.zeros((len(drafts), nodes), dtype=np.int64)
        laws = np.full(tokens.shape, Law.PADDING, dtype=np.uint8)
        for b, (draft, n) in enumerate(zip(drafts, context.host_lengths, strict=True)):
            tokens[b, : 1 + len(draft)] = [text[b, n - 1], *draft]
            laws[b, : 1 + len(draft)] = Law.POINT
        device = context.tokens.device
        topology = chain(len(drafts), nodes, device)
        return DraftTree(torch.from_numpy(tokens).to(device), topology, torch.from_numpy(laws).to(device))

    def _lookup(self, text: np.ndarray) -> np.ndarray:
        """What followed the latest earlier occurrence of the longest suffix of `text` [length] that has one."""
        ends = np.flatnonzero(text[:-1] == text[-1])  # earlier places of the last token; the match may only grow back
        for n in range(1, self.max_ngram):
            longer = ends[ends >= n]
            longer = longer[text[longer - n] == text[-1 - n]] if n < len(text) else longer[:0]
            if not len(longer):
                break
            ends = longer
        return text[ends[-1] + 1 :] if len(ends) else text[:0]
