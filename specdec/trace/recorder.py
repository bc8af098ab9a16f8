"""Notes what a run does, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.coins import Coins
from specdec.outcome import Outcome
from specdec.rules.base import Decisions
from specdec.target_law import TargetLaw
from specdec.trace.laws import Record
from specdec.trace.trace import Step, Trace
from specdec.trace.visits import visits
from specdec.tree import DraftTree

if TYPE_CHECKING:
    from specdec.request import Request


class Recorder:
    """Keeps the trace of one run.

    Args:
        request: what the run was asked for.
        prefill_seconds: time from the call until the prompts were read.
    """

    def __init__(self, request: Request, prefill_seconds: float):
        self.trace = Trace(prefill_seconds=prefill_seconds)
        self.reads_laws = request.trace != "summary"
        self._request = request
        self._record: Record | None = None

    def note(self, tree: DraftTree, law: TargetLaw, decisions: Decisions, coins: Coins, left: Tensor) -> None:
        """Record what a step is decided on, if the trace needs laws.

        Call it before the texts grow: logits processors read them.

        Args:
            tree, law, decisions, coins: those of this step.
            left: [batch] int64: tokens that each row may still emit, before this step.
        """
        if self.reads_laws:
            request = self._request
            run = {
                "seed": request.seed,
                "keys": list(coins.keys),
                "steps": list(coins.steps),
                "spec": request.spec,
                "budget": left,
            }
            stop = torch.tensor(request.stop_tokens, dtype=torch.int64)
            self._record = Record.of(tree, law, decisions, **run, stop_tokens=stop)

    def step(self, nodes: int, held: list[int], outcome: Outcome, seconds: tuple[float, float, float, float]) -> None:
        """Add a step to the trace.

        Args:
            nodes: size of its trees.
            held: the text in each row.
            outcome: what it gave.
            seconds: times of reading new prompts, drafting, verification and all the rest.
        """
        request, record = self._request, self._record
        visited = None
        if request.trace == "ceiling" and record is not None:
            visited = visits(record, outcome.accepted, outcome.tried, request.rule)
        kept = record if request.trace == "laws" else None
        rows = list(map(len, outcome.emitted))
        self.trace.steps.append(Step(nodes, held, rows, outcome.accepted, outcome.tried, *seconds, visited, kept))
