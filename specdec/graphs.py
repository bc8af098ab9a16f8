"""Steps as CUDA graphs: every stage is captured once per shape and then replayed.

A replay repeats what a stage did to the device when it was captured, in the same memory, and runs no Python. A stage may
therefore be captured if what it does depends on nothing that the host knows but what stands in its key (shapes, and
`Context.longest`), if it reads nothing back, and if whatever outlives the step is updated in place. The loop is written that
way; drafters, tree policies, rules and targets say of themselves whether they are (`capturable`). Where a stage cannot be,
parts of it may be: the passes of a draft that the host steers.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdec.checks import check_callable, check_kind
from specdec.drafters.drafter import Acceptance, Report
from specdec.engine import Engine
from specdec.target import Scores
from specdec.tree import DraftTree, Topology
from specdec.trees.policy import Frontier

_BLOCK = 256  # tokens: texts whose lengths fall in one block share graphs, and attend to as many slots too many at most


class Graph(Protocol):
    """A captured stage."""

    outputs: Any  # of the stage; every replay fills the same tensors

    def replay(self) -> None: ...


_Capture = Callable[[Callable[[], Any]], Graph]


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
        self._graphs: dict[Hashable, Graph] = {}

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
            self._times: Counter[Hashable] = Counter()  # that stages were run
            self._held: dict[Hashable, tuple[Any, ...]] = {}  # what stages are captured with
            self._graphs = {}
            self._reasons: dict[str, str] = {}  # of stages that cannot be captured
            self._how = self._capture
            if self._how is None and device.type == "cuda":
                self._how = partial(CudaGraph, torch.cuda.Stream(device), torch.cuda.graph_pool_handle())
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
        self, key: Hashable, name: str, capture: _Capture, stage: Callable[..., Any], args: tuple[Any, ...]
    ) -> Any:
        self._times[key] += 1
        if self._times[key] == 1:  # what happens once (kernels are compiled, constants made) is not to be captured
            return stage(*args)
        if self._times[key] == 2:
            return self._watched(name, stage, args)
        held = self._hold(key, args)
        if key not in self._graphs:
            self._graphs[key] = capture(lambda: stage(*held))
        self._graphs[key].replay()
        return self._graphs[key].outputs

    def _watched(self, name: str, stage: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with HostReads() as host:
            result = stage(*args)
        if host.reads:
            self._leave_out(name, f"it waits for the device ({', '.join(sorted(host.reads))})")
        return result

    def _hold(self, key: Hashable, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """`args` in the memory that the stage is captured with: where they are, if they were captured themselves."""
        if key not in self._held:
            made = {id(graph.outputs) for graph in self._graphs.values()}
            self._held[key] = tuple(
                arg if id(arg) in made else _with(arg, [t.clone() for t in _tensors(arg)]) for arg in args
            )
        held = self._held[key]
        for to, arg in zip(held, args, strict=True):
            if to is not arg:
                for target, source in zip(_tensors(to), _tensors(arg), strict=True):
                    target.copy_(source)
        return held

    def _leave_out(self, name: str, reason: str) -> None:
        if name not in self._reasons:
            self._reasons[name] = reason
            warnings.warn(
                f"engine: the stage {name!r} runs step by step, the others as graphs: {reason}.", stacklevel=2
            )


class CudaGraph:
    """A stage captured on a stream, and thereby on its device, which need not be the current one."""

    def __init__(self, stream: Any, pool: Any, stage: Callable[[], Any]):
        self._graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # not every drafter follows
            # of this thread alone: what others do to the device (load data, serve) must not undo the capture
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.outputs = stage()

    def replay(self) -> None:
        self._graph.replay()


class HostReads(TorchFunctionMode):
    """Notes in `reads` for what the device waits for the host, or the host for it: none of that can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: set[str] = set()
        self._below = _Waits(self.reads)

    def __enter__(self) -> HostReads:
        self._below.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._below.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexed = func in (Tensor.__getitem__, Tensor.__setitem__) and _by_list(args[1])
        if indexed or func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            self.reads.add("a tensor made from Python numbers")
        return func(*args, **(kwargs or {}))


def _by_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(i, (list, tuple)) for i in index))


class _Waits(TorchDispatchMode):
    def __init__(self, reads: set[str]):
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = _WAITING.intersection(func.tags) or func.overloadpacket in _MORE
        if func.overloadpacket == torch.ops.aten.index:  # by a mask it waits, by numbers it does not
            waits = any(t.dtype == torch.bool for t in tree_leaves(args[1]) if isinstance(t, Tensor))
        if waits:
            self._reads.add(str(func))
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.dim()]
        if len({t.device for t in tensors}) > 1:  # of two GPUs too: a graph is of one
            self._reads.add(str(func))
        return out


# the host has to know a value, or a shape
_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_MORE = {torch.ops.aten.is_nonzero, torch.ops.aten.nonzero_numpy}  # that do not say so


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


def _shape(value: Any) -> Hashable:
    """What a captured stage depends on besides the numbers in `_tensors`."""
    shapes = tuple((tuple(t.shape), t.dtype) for t in _tensors(value))
    grown = isinstance(value, DraftTree | Frontier)
    return (shapes, value.topology.depth, value.topology.width) if grown else shapes
