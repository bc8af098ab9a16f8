"""Steps as CUDA graphs: every stage is captured once per shape and then replayed.

A replay repeats what a stage did to the device when it was captured, in the same memory, and runs no Python. A stage may
therefore be captured if what it does depends on nothing that the host knows but what stands in its key (shapes, and
`Context.longest`), if it reads nothing back, and if whatever outlives the step is updated in place. The loop is written that
way; drafters, tree policies, rules and targets say of themselves whether they are (`capturable`). Where a stage cannot be,
parts of it may be: the passes of a draft that the host steers.

A capture runs the stage's Python and nothing on the device. If it fails the stage is run again as it stands, from then on in
every step: what its Python leaves behind must not depend on how often it has run.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from specdec.checks import check_callable, check_kind
from specdec.drafters.base import Acceptance, Report
from specdec.engines.base import Engine
from specdec.engines.cuda_graph import CudaCapture
from specdec.engines.host_reads import HostReads
from specdec.models.target import Scores
from specdec.tree import DraftTree, Topology
from specdec.trees.base import Frontier

_BLOCK = 256  # tokens: texts whose lengths fall in one block share graphs, and attend to as many slots too many at most


class Graph(Protocol):
    """A captured stage."""

    outputs: Any  # of the stage; every replay fills the same tensors

    def replay(self) -> None: ...


_Capture = Callable[[Callable[[], Any]], Graph]


class _Captured(NamedTuple):
    graph: Graph
    args: tuple[Any, ...]  # in the memory that the stage was captured with


class Graphs(Engine):
    """Static buffers, and one CUDA graph per stage and shape. On other devices the same code runs uncaptured.

    >>> engine = specdec.Graphs()
    >>> specdec.generate(target, prompts, drafter, engine=engine)  # the third step of every shape is captured
    >>> specdec.generate(target, others, drafter, engine=engine)  # same sizes: nothing is captured again

    Graphs and buffers are kept until a run of another kind begins (other models, drafter, rule, sampling, batch size, or
    texts of more blocks, or a drafter or a Target that another engine has used since), or the engine is dropped.

    Args:
        compile: compile the forward passes of transformers models too (torch.compile, once per shape and process).
        capture: how a stage is captured; by default as a CUDA graph where there is CUDA, else not at all.
    """

    fixed = True

    def __init__(self, *, compile: bool = False, capture: _Capture | None = None):
        check_kind("compile", compile, bool, "pass True or False")
        if capture is not None:
            check_callable("capture", capture, "pass a function that captures a stage, or None")
        self.compiled, self._capture = compile, capture
        self._made_for: Any = None
        self._inside = False  # a stage that is captured as a whole
        self._graphs: dict[Hashable, _Captured] = {}

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def rounded(self, length: int) -> int:
        return -(-length // _BLOCK) * _BLOCK

    def forget(self) -> None:
        self._made_for = None

    def begin(self, device: torch.device, signature: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if (device, signature) != self._made_for:
            self._made_for, self._buffers = (device, signature), make()
            self._device = device
            self._times: Counter[Hashable] = Counter()  # that stages were run
            self._graphs = {}
            self._filled: dict[tuple[int, ...], Hashable] = {}  # by which graph, by the ids of the tensors
            self._reasons: dict[str, str] = {}  # of stages that cannot be captured
            self._how = self._capture
            if self._how is None and device.type == "cuda":
                self._how = CudaCapture(device)
        return self._buffers

    def perform(self, key: Hashable, stage: Callable[..., Any], reason: str | None, *args: Any) -> Any:
        name = stage.__name__.strip("_")
        if reason is not None:
            self._leave_out(name, reason)
        if self._how is None or self._inside or name in self._reasons:
            return stage(*args)
        self._inside = True
        try:
            return self._replayed((name, key, *map(_shape, args)), name, self._how, stage, args)
        finally:
            self._inside = False

    def _replayed(
        self, key: tuple[Hashable, ...], name: str, capture: _Capture, stage: Callable[..., Any], args: tuple[Any, ...]
    ) -> Any:
        self._times[key] += 1
        if self._times[key] == 1:  # what happens once (kernels are compiled, constants made) is not to be captured
            return stage(*args)
        if self._times[key] == 2:
            return self._watched(name, stage, args)
        # a graph reads what others fill where they fill it: with arguments from elsewhere it would be another
        sources = [self._filled.get(_ids(arg)) for arg in args]
        key = (*key, *sources)
        try:
            if key not in self._graphs:
                held = tuple(map(self._held, args, sources))
                self._graphs[key] = _Captured(capture(lambda: stage(*held)), held)
            graph, held = self._graphs[key]
            for to, arg, source in zip(held, args, sources, strict=True):
                if source is None:
                    for target, new in zip(_tensors(to), _tensors(arg), strict=True):
                        target.copy_(new)
            graph.replay()
            self._filled[_ids(graph.outputs)] = key
        except Exception as error:
            self._leave_out(name, f"capturing or replaying it failed ({_summary(error)})")
            return stage(*args)
        return _anew(graph.outputs)

    def _watched(self, name: str, stage: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with HostReads(self._device) as host:
            result = stage(*args)
        if host.reads:
            self._leave_out(name, f"it waits for the device ({', '.join(sorted(host.reads))})")
        return result

    def _held(self, arg: Any, source: Hashable | None) -> Any:
        """`arg` in the memory that a stage is captured with: where it is, if the graph `source` fills it."""
        if source is None:
            return _with(arg, [tensor.clone() for tensor in _tensors(arg)])
        return _anew(self._graphs[source].graph.outputs)

    def _leave_out(self, name: str, reason: str) -> None:
        if name not in self._reasons:
            self._reasons[name] = reason
            warnings.warn(
                f"engine: the stage {name!r} runs step by step, the others as graphs: {reason}.", stacklevel=2
            )


def _tensors(value: Any) -> list[Tensor]:
    """What a result of a stage consists of."""
    match value:
        case DraftTree():
            probs = [] if value.draft_probs is None else [value.draft_probs]
            return [value.tokens, value.topology.parents, value.laws, *probs]
        case Frontier():
            return [value.tokens, value.topology.parents]
        case Scores():
            return [t for t in value if t is not None]
        case Acceptance():
            return [value.path, value.keep, value.report.columns]
    return [value]


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(map(id, _tensors(value)))


def _anew(value: Any) -> Any:
    """The same tensors without what has been derived from their contents since the capture.

    What was derived during the capture is part of the graph, and stays: every replay derives it again in its place.
    """
    match value:
        case DraftTree() | Frontier():
            return replace(value, topology=copy(value.topology))
        case Acceptance():
            return replace(value, report=copy(value.report))
    return value


def _with(value: Any, tensors: list[Tensor]) -> Any:
    """The same made of other tensors."""
    match value:
        case DraftTree():
            tokens, parents, laws, *probs = tensors
            shape = value.topology
            return DraftTree(tokens, Topology(parents, shape.depth, shape.width), laws, *probs)
        case Frontier():
            return Frontier(tensors[0], Topology(tensors[1], value.topology.depth, value.topology.width))
        case Scores():
            return Scores(tensors[0], tensors[1] if len(tensors) > 1 else None)
        case Acceptance():
            return Acceptance(tensors[0], tensors[1], Report(tensors[2]))
    return tensors[0]


def _summary(error: Exception) -> str:
    """Its type, and the first line of what it says: CUDA's errors go on with general advice."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _shape(value: Any) -> Hashable:
    """What a captured stage depends on besides the numbers in `_tensors`."""
    shapes = tuple((tuple(t.shape), t.dtype) for t in _tensors(value))
    grown = isinstance(value, DraftTree | Frontier)
    return (shapes, value.topology.depth, value.topology.width) if grown else shapes
