"""One case of the certificate of batched code: a rule on laws that floating point is bad at, and the figures it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from certificates.cases import law_name, sampling_name
from specdec import Law, Sampling
from specdec.rules import BlockVerification, KSeq, Rule
from specdec.testing.fast_paths import measured
from specdec.testing.hard_laws import AS_DRAWN, hard_nodes

KEYS = (
    "rule", "law", "width", "vocab", "sampling", "dtype", "weights", "due", "refused", "total_variation", "bound", "worst",
    "nan",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class FastCase:
    """A rule on all hard laws of one shape."""

    rule: Rule
    vocab: int
    law: Law
    width: int
    sampling: Sampling
    dtype: torch.dtype
    weights: str = AS_DRAWN

    @property
    def due(self) -> bool:
        """Whether the rule has to accept such trees."""
        if isinstance(self.rule, BlockVerification):
            return self.width == 1
        return not isinstance(self.rule, KSeq) or self.width == 1 or self.law == Law.IID

    def row(self) -> dict[str, Any]:
        """The row of the certificate, with exactly the keys `KEYS`."""
        hard = hard_nodes(self.vocab, self.law, self.width, self.sampling, self.dtype, self.weights)
        named = [type(self.rule).__name__, law_name(frozenset({self.law})), self.width, self.vocab]
        named += [sampling_name(self.sampling), str(self.dtype).removeprefix("torch."), self.weights, self.due]
        try:
            self.rule.check(hard.spec)
        except ValueError as error:
            return dict(zip(KEYS, [*named, str(error), None, None, None, None], strict=True))
        found = measured(self.rule, hard)
        worst = max(found, key=lambda row: row["total_variation"])
        figures = [worst["total_variation"], worst["bound"], worst["case"], worst["nan"]]
        return dict(zip(KEYS, [*named, None, *figures], strict=True))
