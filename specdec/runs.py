"""What a run owns: texts, coins, the runs of target and drafter, and captured stages. A later run may go on in it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import check_kind
from specdec.coins import Coins
from specdec.drafters.base import Drafter, DraftRun
from specdec.engines.base import Stages
from specdec.models.fingerprint import fingerprint
from specdec.models.probe import autocast_dtype
from specdec.models.target import Target, TargetRun

if TYPE_CHECKING:
    from specdec.arguments import Request


@dataclass(eq=False)
class Runs:
    """What a run owns.

    Args:
        key: all that its tensors and captured stages depend on.
        batch: the texts.
        coins: the coins.
        stop_tokens: [n] int64: ids that end a text.
        stages: runs the stages of a step.
        target, drafter: the runs of the parts.
        description: the drafter that `drafter` is a run of.
        busy: a lock that is held while a run uses these parts.
    """

    key: Any
    batch: Batch
    coins: Coins
    stop_tokens: Tensor
    stages: Stages
    target: TargetRun
    drafter: DraftRun
    description: Drafter
    busy: threading.Lock

    def is_of(self, target: Target) -> bool:
        """Whether it is a run of this target, or of an equal one."""
        return self.target.target == target


def start(request: Request) -> Runs:
    """Begin a run and read the prompts. It uses the parts of an earlier run where it can, and holds them until `end`."""
    stages = request.engine.stages(request.target.device)
    capacity = stages.rounded(request.longest) + request.largest_tree
    key = _key(request, capacity)
    last = request.last if request.last is not None else request.engine.take(key)
    if last is not None and not last.busy.acquire(blocking=False):
        last = None  # in use elsewhere: begin anew, which gives the same text
    # Caches may be those of `last`, so the new run holds the same lock.
    busy = last.busy if last is not None else _taken()
    try:
        return _begun(request, key, capacity, stages, busy, last)
    except BaseException:
        busy.release()
        raise


def end(request: Request, runs: Runs) -> None:
    """Release the parts: for a later turn if the run is kept, else for the engine's next run of the same kind."""
    runs.busy.release()
    if not request.keep and request.last is None:  # else somebody's generation holds it, or parts of it
        request.engine.give_back(runs.key, runs)


def _begun(request: Request, key: Any, capacity: int, new: Stages, busy: threading.Lock, last: Runs | None) -> Runs:
    target, drafter = request.target, request.drafter
    same = last if last is not None and last.key == key else None
    batch, coins, stop = (same.batch, same.coins, same.stop_tokens) if same else _allocated(request, capacity)
    stages = same.stages if same else new
    batch.begin(request, stages)
    coins.reseed(request.seed, request.first_index)
    with torch.inference_mode():
        scoring = target.start(batch, drafter.states, last.target if last and last.is_of(target) else None)
        _check_run(scoring, TargetRun, target, batch)
        drafting = drafter.start(scoring, batch, last.drafter if last and last.description is drafter else None)
        _check_run(drafting, DraftRun, drafter, batch)
        if not (same and scoring is same.target and drafting is same.drafter):
            batch.stages = stages = new  # graphs captured before read tensors of other runs
        rows = [*range(len(batch))]
        scoring.enter(rows, drafting)
        drafting.enter(rows)
    return Runs(key, batch, coins, stop, stages, scoring, drafting, drafter, busy)


def _check_run(run: Any, kind: type, part: object, batch: Batch) -> None:
    """Raise ValueError unless this, which `part.start` returned, is a run over this batch."""
    whose = f"what {type(part).__name__}.start returned"
    check_kind(whose, run, kind)
    if run.batch is not batch:
        raise ValueError(f"{whose} is a run over another batch; return `last` only where `last.batch is batch`.")


def _allocated(request: Request, capacity: int) -> tuple[Batch, Coins, Tensor]:
    """Texts, coins and stop tokens of a new run."""
    rows, nodes, target = len(request.prompts), request.spec.nodes, request.target
    with torch.inference_mode(False):  # a stream, or a later run, may go on outside of the caller's
        coins = Coins(request.seed, rows, nodes, target.device) if request.coins is None else request.coins(rows, nodes)
        stop = torch.tensor(request.stop_tokens, dtype=torch.int64, device=target.device)
        return Batch(rows, capacity, target.vocab, target.device), coins, stop


def _taken() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _key(request: Request, capacity: int) -> Any:
    """All that tensors and captured stages depend on, to be compared with `==`."""
    target, drafter, engine = request.target, request.drafter, request.engine
    rows, stop = len(request.prompts), request.stop_tokens
    shapes = engine, rows, capacity, request.spec.nodes, target.vocab, target.device, stop, request.coins
    if not engine.captures:
        return shapes
    models = [model for model in (target.model, *drafter.models) if model is not None]
    computes = fingerprint(*models, numbers=False), autocast_dtype(target.device)
    return *shapes, target, drafter, request.rule, request.sampling, request.spec, request.notes, *computes
