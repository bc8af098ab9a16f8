"""What happened, step by step, and the metrics computed from it: one definition each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.checks import as_float, check_kind
from specdec.outcome import Outcome
from specdec.rules.base import Rule
from specdec.trace.laws import Record
from specdec.trace.serving import serving

LEVELS = ("summary", "ceiling", "laws")  # what can be recorded
PARTS = ("enter_seconds", "draft_seconds", "verify_seconds", "other_seconds")  # what a step's time consists of


class Visit(NamedTuple):
    """A node on the accepted path (the root and the last node included) that had children.

    Args:
        children: how many.
        slot: place of the accepted child in the order they were drawn; None if none was accepted.
        ceiling: the largest probability with which a child can be accepted: `specdec.theory.one_step_ceiling`.
        divergence: total variation between the rule's law of the next token and the target's, by
            `specdec.theory.divergence`; None if it is not known.
    """

    children: int
    slot: int | None
    ceiling: float
    divergence: float | None


@dataclass(frozen=True)
class Step:
    """One step of the loop. Lists have one entry per row.

    Args:
        nodes: size of the draft trees, the root included.
        held: index of the text in the row; -1 while a prompt is being read. Without slots, row i holds text i.
        emitted: tokens emitted; 0 if the text had ended before, or while its prompt is being read.
        accepted: how many of those were drafted.
        tried: the deepest depth at which drafted tokens were tested: accepted, or accepted + 1.
        enter_seconds: time of reading new prompts before the step.
        draft_seconds: time of drafting.
        verify_seconds: time of the target's forward pass.
        other_seconds: time of all the rest.
        visits: with trace="ceiling", the first tried[row] nodes of each row's path, from the root down.
        record: with trace="laws", what the step was decided on.
    """

    nodes: int
    held: list[int]
    emitted: list[int]
    accepted: list[int]
    tried: list[int]
    enter_seconds: float
    draft_seconds: float
    verify_seconds: float
    other_seconds: float
    visits: list[list[Visit]] | None = None
    record: Record | None = None

    @property
    def seconds(self) -> float:
        """Time of the whole step, reading of new prompts included."""
        return sum(getattr(self, part) for part in PARTS)

    def row(self, text: int) -> int | None:
        """The row that holds a text; None if no row does."""
        return self.held.index(text) if text in self.held else None

    def cut(self, row: int, kept: int) -> None:
        """Forget all but the first `kept` tokens of a row."""
        for counts in (self.emitted, self.accepted, self.tried):
            counts[row] = min(counts[row], kept)
        if self.visits is not None:
            del self.visits[row][self.tried[row] :]
        if self.record is not None:
            self.record.budget[row] = kept


@dataclass
class Trace:
    """All steps of a run.

    Args:
        prefill_seconds: time from the call until the prompts were read.
        steps: in order.
    """

    prefill_seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)

    def cut(self, text: int, beyond: int) -> None:
        """Forget the last `beyond` tokens of a text."""
        for step in reversed(self.steps):
            if not beyond:
                break
            if (row := step.row(text)) is not None:
                gone = min(step.emitted[row], beyond)
                step.cut(row, step.emitted[row] - gone)
                beyond -= gone

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to one safetensors file, for `load`."""
        tensors: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        for i, step in enumerate(self.steps):
            rows.append({**asdict(replace(step, record=None)), "record": None})
            if step.record is not None:
                parts, rows[-1]["record"] = step.record.to_file()
                # cloned, as safetensors writes no tensors that share memory
                tensors |= {f"{i}.{name}": part.clone() for name, part in parts.items()}
        about = {"prefill_seconds": self.prefill_seconds, "steps": rows}
        save_file(tensors, path, metadata={_FORMAT: json.dumps(about)})

    def summary(self, price_per_hour: float | None = None) -> dict[str, Any]:
        """The metrics of the run, by name; of a job that went on from a journal, those of its last call.

        Rows without a text, rows whose text has ended and rows whose prompt is being read count nowhere but in `rows_running`.

        Args:
            price_per_hour: of the machine, in any currency, for `cost_per_million_tokens`; ValueError unless positive.

        Metrics:
            acceptance_length: tokens emitted per target forward and row still running, prefill excluded.
            acceptance_rate: list over depth d = 1, 2, ...: accepted at d / drafted at d among the steps in which depth
                d - 1 was accepted.
            tokens: tokens emitted, all texts together.
            tokens_per_second: tokens / decode_seconds. So the reading of the first prompts is left out, and that of prompts
                which enter later is counted: where none does, this is decoding alone.
            target_forwards: the target's forward passes over draft trees, each for the whole batch: one a step.
            target_forwards_per_token: target_forwards / tokens; None without tokens.
            enter_seconds, draft_seconds, verify_seconds, other_seconds: where the time of the steps went: reading prompts
                that enter, proposing, target forwards, all the rest (laws, rule, bookkeeping).
            decode_seconds: these four together.
            rows_running: share of the batch's rows that got tokens in a step, as the mean over steps.
            ttft_seconds: time to first tokens, of each text that got some: from when it got its row (at the call, or at the
                beginning of the step that entered it or the first part of its prompt) to the end of the step that gave its
                first tokens. {"median": ..., "p95": ...} over texts, the 95th percentile interpolated linearly.
            tpot_seconds: time per output token, of each text with tokens after its first step's: from the end of that step to
                the end of its last one / the tokens that it got meanwhile. The same two over texts; None where there are none.
            longest_gap_seconds: longest time from the end of a step to the end of the next one, entering included.
            cost_per_million_tokens: with a price: that of prefill_seconds + decode_seconds, for a million tokens at the rate
                of this run; None without tokens.
            ceiling_share: with trace="ceiling", if anything could be accepted at all: accepted drafted tokens / sum of
                `one_step_ceiling` over the visited nodes. Its mean is at most 1 for rules that decide node by node, and 1
                for the best of them. Block and traversal verification may exceed 1, as they look at what was drawn
                below a node before they decide on it; so may lossy rules.
            divergence: with trace="ceiling", the mean over tokens of the total variation between the law that a token was
                emitted from and the target's law there. 0 for lossless rules, None for rules without `Rule.trial`.
        """
        tokens = sum(sum(s.emitted) for s in self.steps)
        running = sum(n > 0 for s in self.steps for n in s.emitted)
        seconds = {part: sum(getattr(s, part) for s in self.steps) for part in PARTS}
        decode = sum(seconds.values())
        return {
            "acceptance_length": tokens / running if running else 0.0,
            "acceptance_rate": self._rates(),
            "tokens": tokens,
            "tokens_per_second": tokens / decode if decode else 0.0,
            "target_forwards": len(self.steps),
            "target_forwards_per_token": len(self.steps) / tokens if tokens else None,
            **seconds,
            "decode_seconds": decode,
            **serving(self),
            **self._cost(price_per_hour, tokens, decode),
            **self._ceiling(tokens),
        }

    def _cost(self, price_per_hour: float | None, tokens: int, decode: float) -> dict[str, float | None]:
        if price_per_hour is None:
            return {}
        price = as_float("price_per_hour", price_per_hour, "(0, inf)") / 3600
        return {"cost_per_million_tokens": 1e6 * price * (self.prefill_seconds + decode) / tokens if tokens else None}

    def _ceiling(self, tokens: int) -> dict[str, float | None]:
        if not self.steps or self.steps[0].visits is None:
            return {}
        visits = [visit for s in self.steps for row in s.visits or () for visit in row]
        ceiling, apart = sum(visit.ceiling for visit in visits), [visit.divergence for visit in visits]
        share = {"ceiling_share": sum(visit.slot is not None for visit in visits) / ceiling} if ceiling else {}
        known = [distance for distance in apart if distance is not None]
        return {**share, "divergence": sum(known) / tokens if len(known) == len(apart) else None}

    def _rates(self) -> list[float]:
        tried = [n for s in self.steps for n in s.tried]
        accepted = [n for s in self.steps for n in s.accepted]
        depths = range(1, max(tried, default=0) + 1)
        return [sum(a >= d for a in accepted) / sum(t >= d for t in tried) for d in depths]


_FORMAT = "specdec trace 2"


def load(path: str | PathLike[str]) -> Trace:
    """The trace that `Trace.save` wrote."""
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get(_FORMAT, "null"))
        if about is None:
            raise ValueError(
                f"{path}: not a file that Trace.save of this version wrote ({_FORMAT!r}); record the run again."
            )
        parts: list[dict[str, Tensor]] = [{} for _ in about["steps"]]
        for name in file.keys():  # noqa: SIM118 - it has no other way to list them
            i, _, part = name.partition(".")
            parts[int(i)][part] = file.get_tensor(name)
    return Trace(about["prefill_seconds"], [_step(row, own) for row, own in zip(about["steps"], parts, strict=True)])


def _step(row: dict[str, Any], tensors: dict[str, Tensor]) -> Step:
    visits, record = row["visits"], row["record"]
    made = {
        "visits": None if visits is None else [[Visit(*visit) for visit in own] for own in visits],
        "record": None if record is None else Record.from_file(tensors, record),
    }
    return Step(**{**row, **made})


def replay(trace: Trace, rule: Rule) -> Trace:
    """What another rule would have decided at every recorded step, on the same trees, laws and coins.

    Each step begins where the recorded run stood, not where the other rule itself would stand by then. Times are 0, as
    nothing is run; `Step.record.decisions` are those of the other rule, before stop tokens and budgets. The recorded rule
    repeats its decisions if it ran on a CPU; GPU kernels may differ where a coin lies within rounding of a threshold.

    Args:
        trace: recorded with trace="laws".
        rule: the other rule; ValueError if it refuses the drafter's trees.
    """
    check_kind("trace", trace, Trace)
    check_kind("rule", rule, Rule)
    return Trace(steps=[_decided_by(rule, step) for step in trace.steps])


def _decided_by(rule: Rule, step: Step) -> Step:
    record = step.record
    if record is None:
        raise ValueError('There are no laws in this trace: record the run with trace="laws".')
    rule.check(record.spec)
    tree = record.tree()
    decisions = rule(tree, record.law(), record.coins())
    invalid = torch.zeros_like(record.budget)
    outcome = Outcome.of(tree, decisions, record.stop_tokens, record.budget, (invalid, invalid))
    counts = (list(map(len, outcome.emitted)), outcome.accepted, outcome.tried)
    return Step(step.nodes, step.held, *counts, 0.0, 0.0, 0.0, 0.0, record=replace(record, decisions=decisions))
