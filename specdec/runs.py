"""What a run owns: texts, coins, the runs of target and drafter, and captured stages. A later run may go on in it.

Rows are filled again while a run goes on (`enter`), and a run may move to a smaller batch (`moved`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import check_kind
from specdec.coins import Coins
from specdec.drafters.base import Drafter, DraftRun
from specdec.models.fingerprint import fingerprint
from specdec.models.memory import DoesNotFit, all_memory
from specdec.models.ready import autocast_dtype
from specdec.models.target import Target, TargetRun

if TYPE_CHECKING:
    from specdec.request import Request, Text


@dataclass(eq=False)
class Runs:
    """What a run owns.

    Args:
        key: all that its tensors and captured stages depend on.
        batch: the texts.
        coins: the coins.
        stop_tokens: [n] int64: ids that end a text.
        target, drafter: the runs of the parts.
        description: the drafter that `drafter` is a run of.
        busy: a lock that is held while a run uses these parts.
        smaller: what a run that was moved from here owned then.
    """

    key: Any
    batch: Batch
    coins: Coins
    stop_tokens: Tensor
    target: TargetRun
    drafter: DraftRun
    description: Drafter
    busy: threading.Lock
    smaller: Runs | None = None

    @property
    def device_memory(self) -> int | None:
        """Bytes of memory that the device has; None where it is not known."""
        return all_memory(self.batch.device)

    @property
    def bytes(self) -> int:
        """Bytes of device memory in texts, caches, buffers and captured stages, and in those of a smaller batch."""
        held = self.batch.tokens.nbytes + self.target.bytes + self.drafter.bytes + self.batch.stages.bytes
        return held + (self.smaller.bytes if self.smaller is not None else 0)

    def is_of(self, target: Target) -> bool:
        """Whether it is a run of this target, or of an equal one."""
        return self.target.target == target


def start(request: Request, texts: Sequence[Text], longest: int) -> Runs:
    """Begin a run with one row for each of these texts, and read them.

    It uses the parts of an earlier run where it can, and holds them until `end`.

    Args:
        longest: tokens that any text may grow to, those that enter later included.
    """
    key = _key(request, len(texts), longest)
    last = request.last or request.engine.take(key)
    if last is not None and not last.busy.acquire(blocking=False):
        last = None  # in use elsewhere: begin anew, which gives the same text
    # Caches may be those of `last`, so the new run holds the same lock.
    busy = last.busy if last is not None else _taken()
    try:
        return _begun(request, texts, longest, key, busy, last, resume=request.last is not None)
    except BaseException:
        busy.release()
        raise


def moved(request: Request, runs: Runs, texts: Sequence[Text]) -> Runs:
    """Go on in a smaller batch, with one row for each of these texts, which must be in `runs`. What was read is copied."""
    longest, last = runs.batch.max_length, runs
    key = _key(request, len(texts), longest)
    if runs.smaller is not None and runs.smaller.key == key:
        last = runs.smaller  # captured already, which saves more than copying
    runs.smaller = _begun(request, texts, longest, key, runs.busy, last, resume=True)
    return runs.smaller


def enter(request: Request, runs: Runs, texts: Mapping[int, tuple[Text, int]]) -> None:
    """Begin texts in rows, each with so many of its tokens, while the other rows go on: (text, length) by row."""
    for row, (text, length) in texts.items():
        runs.batch.enter(row, text, length)
    news = [text for text, _ in texts.values()]
    runs.coins.enter([*texts], [text.key for text in news], [text.step for text in news])
    runs.batch.resume = False
    with torch.inference_mode():
        target, drafter = runs.target, runs.drafter
        if not target.enters:
            runs.target = request.target.start(runs.batch, request.drafter.states, target)
            _check_run(runs.target, TargetRun, request.target, runs.batch)
        if not drafter.enters or runs.target is not target:
            runs.drafter = request.drafter.start(runs.target, runs.batch, drafter)
            _check_run(runs.drafter, DraftRun, request.drafter, runs.batch)
        all_rows = [*range(len(runs.batch))]
        # A drafter that is begun anew knows no states of the other rows either.
        unseen = request.drafter.states and not drafter.enters
        runs.target.enter([*texts] if runs.target is target and not unseen else all_rows, runs.drafter)
        runs.drafter.enter([*texts] if runs.drafter is drafter else all_rows)
        if runs.target is not target or runs.drafter is not drafter:
            runs.batch.stages = request.engine.stages(request.target.device)


def end(request: Request, runs: Runs) -> None:
    """Release the parts: for a later turn if the run is kept, else for the engine's next run of the same kind."""
    runs.busy.release()
    if not request.keep and request.last is None:  # else somebody's generation holds it, or parts of it
        request.engine.give_back(runs.key, runs)


def _begun(request: Request, *args: Any, **named: Any) -> Runs:
    """As `_started`; if memory does not suffice, once more without what ended runs have given back."""
    try:
        return _started(request, *args, **named)
    except (DoesNotFit, torch.OutOfMemoryError):
        if not request.engine.drop():
            raise
    return _started(request, *args, **named)


def _started(
    request: Request,
    texts: Sequence[Text],
    longest: int,
    key: Any,
    busy: threading.Lock,
    last: Runs | None,
    resume: bool,
) -> Runs:
    """A run at its first step, in the parts of `last` where they fit; if it resumes, from what was read there."""
    target, drafter, rows = request.target, request.drafter, [*range(len(texts))]
    same = last if last is not None and last.key == key else None
    batch, coins, stop = (
        (same.batch, same.coins, same.stop_tokens) if same else _allocated(request, len(texts), longest)
    )
    batch.begin(request, texts, longest, resume)
    coins.begin(request.seed, [text.key for text in texts], [text.step for text in texts])
    with torch.inference_mode():
        scoring = target.start(batch, drafter.states, last.target if last and last.is_of(target) else None)
        _check_run(scoring, TargetRun, target, batch)
        drafting = drafter.start(scoring, batch, last.drafter if last and last.description is drafter else None)
        _check_run(drafting, DraftRun, drafter, batch)
        if not (same and scoring is same.target and drafting is same.drafter):
            batch.stages = request.engine.stages(target.device)  # graphs captured before read tensors of other runs
        scoring.enter(rows, drafting)
        drafting.enter(rows)
    return Runs(key, batch, coins, stop, scoring, drafting, drafter, busy, same and same.smaller)


def _capacity(request: Request, longest: int) -> int:
    """Slots of a row."""
    return request.engine.room(longest) + request.largest_tree


def _check_run(run: Any, kind: type, part: object, batch: Batch) -> None:
    """Raise ValueError unless this, which `part.start` returned, is a run over this batch."""
    whose = f"what {type(part).__name__}.start returned"
    check_kind(whose, run, kind)
    if run.batch is not batch:
        raise ValueError(f"{whose} is a run over another batch; return `last` only where `last.batch is batch`.")


def _allocated(request: Request, rows: int, longest: int) -> tuple[Batch, Coins, Tensor]:
    """Texts, coins and stop tokens of a new run."""
    nodes, target = request.spec.nodes, request.target
    with torch.inference_mode(False):  # a stream, or a later run, may go on outside of the caller's
        coins = Coins(request.seed, rows, nodes, target.device) if request.coins is None else request.coins(rows, nodes)
        stop = torch.tensor(request.stop_tokens, dtype=torch.int64, device=target.device)
        return Batch(rows, _capacity(request, longest), target.vocab, target.device), coins, stop


def _taken() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _key(request: Request, rows: int, longest: int) -> Any:
    """All that tensors and captured stages depend on, to be compared with `==`."""
    target, drafter, engine, stop = request.target, request.drafter, request.engine, request.stop_tokens
    capacity = _capacity(request, longest)
    # a weak reference, as keys are kept by the engine: in a circle it would keep its memory until Python next looks for circles
    shapes = ref(engine), rows, capacity, request.spec.nodes, target.vocab, target.device, stop, request.coins
    if not engine.static_shapes:
        return shapes
    models = [model for model in (target.model, *drafter.models) if model is not None]
    computes = fingerprint(*models, numbers=False), autocast_dtype(target.device)
    return *shapes, target, drafter, request.rule, request.sampling, request.spec, request.notes, *computes
