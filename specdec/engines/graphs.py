"""Steps as CUDA graphs: every stage is captured once per shape and then replayed.

A replay repeats what a stage did to the device when it was captured, in the same memory, and runs no Python. So a stage can
be captured if it

- depends on no host values but those in its key (shapes, and never a length of text: those are read on the device),
- reads nothing back from the device, and
- updates in place whatever outlives the step.

The loop is written that way; drafters, tree policies, rules and targets declare it (`capturable`). Of a stage that cannot be
captured, parts may be: the forward passes of a draft model.

A capture runs the stage's Python and nothing on the device. If it fails, the stage is called directly, in this step and all
later ones of the run. So the state that its Python leaves behind must not depend on how often it has run.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from specdec.checks import as_int, check_callable, check_flag, put
from specdec.engines.base import Engine, Stages
from specdec.engines.cuda_graph import CudaCapture
from specdec.engines.host_reads import HostReads
from specdec.engines.pool import Parts, Pool

# The room of a row, in slots, is a multiple of this. Code is compiled for one size of the cache, so that such rooms are powers
# of two between these, and multiples of the last.
_BLOCK = 256
_COMPILED = 1024, 4096


class Graph(Protocol):
    """A captured stage."""

    outputs: Any  # what the stage returned; every replay fills the same tensors
    bytes: int  # of device memory that it holds

    def replay(self) -> None: ...


_Capture = Callable[[Callable[[], Any]], Graph]


class _Captured(NamedTuple):
    graph: Graph
    args: tuple[Any, ...]  # the arguments, in the memory that the graph reads
    bytes: int  # of device memory that both hold


class Graphs(Engine):
    """Fixed buffers, and one CUDA graph per stage and shape. On other devices the same code runs uncaptured.

    >>> engine = specdec.Graphs()
    >>> specdec.generate(target, prompts, drafter, engine=engine)  # the third step of every shape is captured
    >>> specdec.generate(target, others, drafter, engine=engine)  # same sizes: nothing is captured again

    A run owns its graphs, the memory that they work in, its caches and its buffers. When it ends it gives them back, and the
    next run of the same kind takes them: one of the same models, drafter, rule, sampling and batch size, whose texts need as
    much room (blocks of 256 tokens). Two runs at once hold two sets. What waits is dropped with the engine, by `drop()`, if a
    run begins that finds too little memory, and, the oldest first, as far as it takes more than `pool_bytes`. Until then the
    models of these runs stay in memory too, which `pooled_bytes` does not count.

    Args:
        compile: compile the forward passes of transformers models too (torch.compile). A layer is compiled once for all layers
            that are alike and for texts of any length, but for each size of tree and of the cache by itself (1024, 2048, 4096,
            8192, 12288, ... tokens): see `specdec.models.compilation`.
        pool_bytes: most bytes of device memory that may wait for later runs; 0 keeps nothing. By default a quarter of what the
            device has. A run that owned more is not kept, and a warning says so.
        capture: how a stage is captured; by default as a CUDA graph where there is CUDA, else not at all.
    """

    static_shapes = True

    def __init__(self, *, compile: bool = False, pool_bytes: int | None = None, capture: _Capture | None = None):
        check_flag("compile", compile)
        if pool_bytes is not None:
            pool_bytes = as_int("pool_bytes", pool_bytes, 0, cure="give a number of bytes; 0 keeps nothing")
        if capture is not None:
            check_callable("capture", capture, "pass a function that captures a stage, or None")
        self.compiles, self._capture = compile, capture
        self._pool, self._lock = Pool(pool_bytes), threading.Lock()
        self._stages: WeakSet[CapturedStages] = WeakSet()

    @property
    def captured(self) -> int:
        """How many graphs exist, in use or idle."""
        with self._lock:
            return sum(len(stages.graphs) for stages in self._stages)

    def room(self, longest: int) -> int:
        least, most = _COMPILED
        block = min(max(1 << (longest - 1).bit_length(), least), most) if self.compiles else _BLOCK
        return -(-longest // block) * block

    def stages(self, device: torch.device) -> CapturedStages:
        capture = CudaCapture(device) if self._capture is None and device.type == "cuda" else self._capture
        made = CapturedStages(device, capture)
        with self._lock:
            self._stages.add(made)
        return made

    @property
    def pooled_bytes(self) -> int:
        """Bytes of device memory that wait for later runs: caches, buffers and graphs of runs that have ended."""
        return self._pool.bytes

    def take(self, key: Any) -> Any:
        return self._pool.take(key)

    def give_back(self, key: Any, parts: Parts) -> None:
        self._pool.add(key, parts)

    def drop(self) -> bool:
        return self._pool.clear()


class CapturedStages(Stages):
    """The captured stages of a run.

    Args:
        device: where stages run.
        capture: how a stage is captured; None: not at all.
    """

    def __init__(self, device: torch.device, capture: _Capture | None):
        self._device, self._capture, self.captures = device, capture, capture is not None
        self.graphs: dict[Hashable, _Captured] = {}
        self._times: Counter[Hashable] = Counter()  # how often each stage was run
        # From the ids of tensors to the key of the graph that fills them.
        self._filled: dict[tuple[int, ...], Hashable] = {}
        self._left_out, self._failed = set[str](), set[str]()  # stages that cannot be captured, and not in this run
        self._inside = False  # whether a stage is being run: its parts are not captured by themselves

    @property
    def bytes(self) -> int:  # type: ignore[override]
        return sum(captured.bytes for captured in self.graphs.values())

    def begin(self) -> None:
        self._failed.clear()

    def perform(self, key: Hashable, stage: Callable[..., Any], reason: str | None, *args: Any) -> Any:
        name = stage.__name__.strip("_")
        if self._capture is None:
            return stage(*args)
        if reason is not None:
            self._leave_out(name, reason, self._left_out)
        if self._inside or name in self._left_out or name in self._failed:
            return stage(*args)
        self._inside = True
        try:
            return self._replayed((name, key, *map(_shape, args)), name, self._capture, stage, args)
        finally:
            self._inside = False

    def _replayed(
        self, key: tuple[Hashable, ...], name: str, capture: _Capture, stage: Callable[..., Any], args: tuple[Any, ...]
    ) -> Any:
        if self._times[key] < 2:
            # the first run compiles kernels and makes constants, which must not be captured
            result = self._watched(name, stage, args) if self._times[key] else stage(*args)
            self._times[key] += 1  # not if it was interrupted
            return result
        # A graph reads its arguments where other graphs fill them, so arguments from elsewhere need another graph.
        sources = [self._filled.get(_ids(arg)) for arg in args]
        key = (*key, *sources)
        try:
            if key not in self.graphs:
                held = tuple(map(self._held, args, sources))
                graph = capture(lambda: stage(*held))
                cloned = [
                    part for arg, source in zip(held, sources, strict=True) if source is None for part in _tensors(arg)
                ]
                self.graphs[key] = _Captured(graph, held, graph.bytes + sum(part.nbytes for part in cloned))
            graph, held, _ = self.graphs[key]
            for to, arg, source in zip(held, args, sources, strict=True):
                if source is None:
                    for target, new in zip(_tensors(to), _tensors(arg), strict=True):
                        target.copy_(new)
            graph.replay()
            self._filled[_ids(graph.outputs)] = key
        except Exception as error:
            self._leave_out(name, f"capturing or replaying it failed ({_summary(error)})", self._failed)
            return stage(*args)
        return _renewed(graph.outputs)

    def _watched(self, name: str, stage: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with HostReads(self._device) as host:
            result = stage(*args)
        if host.reads:
            self._leave_out(name, f"it waits for the device ({', '.join(sorted(host.reads))})", self._left_out)
        return result

    def _held(self, arg: Any, source: Hashable | None) -> Any:
        """`arg` in the memory that a stage is captured with: where it is, if the graph `source` fills it."""
        return _cloned(arg) if source is None else _renewed(self.graphs[source].graph.outputs)

    def _leave_out(self, name: str, reason: str, among: set[str]) -> None:
        if name not in among:
            among.add(name)
            warnings.warn(
                f"engine: the stage {name!r} runs step by step, the others as graphs: {reason}.", stacklevel=2
            )


def _parts(value: Any) -> list[Any]:
    """What passes between stages (tensors, dataclasses of them, and dataclasses of those), field by field."""
    if not is_dataclass(value):
        return [value]
    return [part for field in fields(value) for part in _parts(getattr(value, field.name))]


def _tensors(value: Any) -> list[Tensor]:
    return [part for part in _parts(value) if isinstance(part, Tensor)]


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(map(id, _tensors(value)))


def _cloned(value: Any) -> Any:
    """The same in memory of its own, and with nothing derived from it."""
    if is_dataclass(value):
        return type(value)(**{field.name: _cloned(getattr(value, field.name)) for field in fields(value)})
    return value.clone() if isinstance(value, Tensor) else value


def _renewed(value: Any) -> Any:
    """The same tensors without what has been derived from their contents after the capture.

    What was derived during the capture is part of the graph, and stays: every replay derives it again in its place.
    """
    if not is_dataclass(value):
        return value
    renewed = copy(value)
    put(renewed, **{field.name: _renewed(getattr(value, field.name)) for field in fields(value)})
    return renewed


def _summary(error: Exception) -> str:
    """An error's type and the first line of its message: CUDA's errors go on with general advice."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _shape(value: Any) -> Hashable:
    """What a captured stage depends on besides the numbers in `_tensors`."""
    if is_dataclass(value):
        return type(value), *(_shape(getattr(value, field.name)) for field in fields(value))
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
