"""Finds stages that wait for their device, before they are captured: a graph cannot repeat that."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Held while a thread's operations are watched. Torch keeps for the whole process that some are, and what overlaps in two
# threads leaves that behind, after which nothing is compiled any more.
watching = threading.RLock()


class HostReads(TorchFunctionMode):
    """Notes in `reads` the operations in which host and device wait for each other: none of them can be captured.

    Threads take turns.

    Args:
        device: the device. On CUDA, waiting inside of operations is noted too.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.reads: set[str] = set()
        self._device = device

    def __enter__(self) -> HostReads:
        with contextlib.ExitStack() as stack:
            stack.enter_context(watching)
            if self._device is not None and self._device.type == "cuda":
                stack.enter_context(_waiting_inside(self.reads))
            stack.enter_context(_Waits(self.reads))
            self._below = stack.pop_all()
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
        if func.overloadpacket == torch.ops.aten.index:  # indexing by a mask waits, by numbers it does not
            waits = any(t.dtype == torch.bool for t in tree_leaves(args[1]) if isinstance(t, Tensor))
        if waits:
            self._reads.add(str(func))
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.dim()]
        if len({t.device for t in tensors}) > 1:  # two GPUs count too, as a graph runs on one
            self._reads.add(str(func))
        return out


# operations whose result, or its shape, the host has to know
_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_MORE = {torch.ops.aten.is_nonzero, torch.ops.aten.nonzero_numpy}  # operations that wait and have neither tag

_SYNCHRONISES = "called a synchronizing CUDA operation"  # the words of torch's warning


@contextlib.contextmanager
def _waiting_inside(reads: set[str]) -> Iterator[None]:
    """Notes in `reads` if this thread waits inside of operations, by torch's own warnings.

    Torch could raise an error instead. A stage would then end half-way, with lengths advanced and keys moved, and could not
    be run again.
    """
    found, thread = torch.cuda.get_sync_debug_mode(), threading.get_ident()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", _SYNCHRONISES)
        show = warnings.showwarning

        def note(message: Any, *rest: Any, **named: Any) -> None:
            if not str(message).startswith(_SYNCHRONISES):
                show(message, *rest, **named)
            elif threading.get_ident() == thread:  # the mode holds for the whole process, and other threads may wait
                reads.add(f"an operation that {_SYNCHRONISES}")

        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(found)
