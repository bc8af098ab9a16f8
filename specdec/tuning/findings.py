"""What a search knows so far, and the plan that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.tuning import roofline
from specdec.tuning.conditions import Conditions, chosen, named
from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import ALONE, Foretold
from specdec.tuning.offers import Offer
from specdec.tuning.plan import Plan
from specdec.tuning.prices import Prices
from specdec.tuning.reasons import reason, verdict
from specdec.tuning.rows import Row, Speedup
from specdec.tuning.search import best_first
from specdec.tuning.writing import Written


@dataclass
class Findings:
    """What a search knows so far."""

    prompts: list[Tensor]
    conditions: Conditions
    offers: list[Offer] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    prices: Prices | None = None
    rows: list[Row] = field(default_factory=list)
    noise: Estimate | None = None
    machine: roofline.Machine | None = None

    def plan(self) -> Plan:
        """The plan by what is known."""
        rows, batch = best_first(self.rows), self.conditions.batch
        shared: dict[str, Any] = {
            "rows": tuple(rows), "refused": self.refused, "notes": tuple(self.notes), "noise": self.noise,
            "conditions": self._held(),
        }  # fmt: skip
        best = rows[0] if rows else None
        told = verdict(best, self.noise) if best else "cannot tell"
        why = reason(best, told, self.noise, batch) if best else "Nothing was foretold or decoded; see the notes."
        taken = best if best and _pays(best, told) else Row(ALONE)
        speedup = taken.speedup if taken is best else Speedup(Estimate(1.0, 1.0, 1.0))
        made = taken.candidate
        return Plan(
            made.name, made.drafter, made.rule, speedup, told, why, roofline=self._roofline(taken.foretold), **shared
        )

    def _held(self) -> dict[str, Any]:
        target = self.conditions.target
        return {
            "target": named(target),
            "prompts": len(self.prompts),
            "texts": len(self.written),
            "batch": self.conditions.batch,
            "sampling": chosen(self.conditions.sampling),
            "new tokens": self.conditions.new_tokens,
            "device": str(target.device),
            "threads": torch.get_num_threads(),
        }

    def _roofline(self, found: Foretold | None) -> roofline.Roofline | None:
        """Where the time of steps goes, of which this is foretold; of steps without a draft by default."""
        model, prices = self.conditions.target.model, self.prices
        if model is None or prices is None or self.machine is None:
            return None
        shares = (found.draft, found.verify, found.other) if found else (0.0, *prices.parts(1))
        context = sum(map(len, self.prompts)) // len(self.prompts)
        sizes = prices.sizes
        return roofline.Roofline(
            machine=self.machine,
            weights=sum(weight.nbytes for weight in roofline.parameters(model)),
            cache=self.conditions.batch * roofline.kept_bytes(self.conditions.target, context),
            operations=2.0 * self.conditions.batch * roofline.products(model),
            nodes=sizes,
            seconds=[prices.unit * float(prices.verify(size)[0]) for size in sizes],
            alone=prices.unit,
            shares=shares,
        )


def _pays(best: Row, told: str) -> bool:
    """Whether to draft: where this machine cannot tell, by what is more probable."""
    known = best.speedup.estimate
    return known is not None and (told == "pays" or (told == "cannot tell" and known.value > 1))
