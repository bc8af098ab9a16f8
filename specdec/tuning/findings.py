"""What a search knows so far, and the plan that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.rules import SiblingRejection
from specdec.tuning import roofline
from specdec.tuning.estimate import Estimate
from specdec.tuning.measuring import Conditions
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
    offers: list[Offer]
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
        if not rows or rows[0].speedup.estimate is None:
            why = (
                "Nothing was foretold or decoded; see the notes." if not rows else reason(rows[0], "cannot tell", batch)
            )
            alone = Speedup(Estimate(1.0), None)
            return Plan("autoregressive", None, SiblingRejection(), alone, "cannot tell", why, **shared)
        best = rows[0]
        told = verdict(best, self.noise)
        why, pays = reason(best, told, batch), _chosen(best, told)
        shared["roofline"] = self._roofline(best if pays else None)
        if not pays:
            alone = Speedup(Estimate(1.0, 1.0, 1.0), self.noise)
            return Plan("autoregressive", None, SiblingRejection(), alone, told, why, **shared)
        candidate = best.candidate
        return Plan(candidate.name, candidate.drafter, candidate.rule, best.speedup, told, why, **shared)

    def _held(self) -> dict[str, Any]:
        sampling, target = self.conditions.sampling, self.conditions.target
        return {
            "prompts": len(self.prompts),
            "texts": len(self.written),
            "batch": self.conditions.batch,
            "temperature": sampling.temperature,
            "new tokens": self.conditions.options["max_new_tokens"],
            "device": str(target.device),
            "threads": torch.get_num_threads(),
        }

    def _roofline(self, best: Row | None) -> roofline.Roofline | None:
        model, prices = self.conditions.target.model, self.prices
        if model is None or prices is None or self.machine is None:
            return None
        found = best.foretold if best else None
        shares = (found.draft, found.verify, found.other) if found else (0.0, *prices.parts(1))
        context = sum(map(len, self.prompts)) // len(self.prompts)
        alone, sizes = float(torch.tensor(prices.alone).median()), prices.sizes
        weights = roofline.parameters(model)
        return roofline.Roofline(
            machine=self.machine,
            weights=sum(weight.nbytes for weight in weights),
            cache=self.conditions.batch * roofline.kept_bytes(self.conditions.target, context),
            operations=2.0 * self.conditions.batch * sum(weight.numel() for weight in weights),
            nodes=sizes,
            seconds=[alone * float(prices.verify(size)[0]) for size in sizes],
            alone=alone,
            shares=shares,
        )


def _chosen(best: Row, told: str) -> bool:
    """Whether to draft: where this machine cannot tell, by what is more probable."""
    known = best.speedup.estimate
    return known is not None and (told == "pays" or (told == "cannot tell" and known.value > 1))
