"""Captures as CUDA graphs, of which one that fails leaves the process as it was."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch


class CudaGraph:
    """A captured stage.

    Args:
        graph: its operations.
        outputs: of the stage; every replay fills the same tensors.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any):
        self.replay, self.outputs = graph.replay, outputs


_failed: list[torch.cuda.CUDAGraph] = []  # kept alive for torch


class CudaCapture:
    """Captures stages on a stream of `device`, which need not be the current one, in memory that they share.

    What fails in a stage is raised as it is. A capture executes nothing, so the device is as it was before it.
    """

    def __init__(self, device: torch.device):
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, stage: Callable[[], Any]) -> CudaGraph:
        graph, outputs, failure = torch.cuda.CUDAGraph(), None, None
        try:
            # `torch.cuda.graph` does not give the stream back where it cannot begin or end: this `with` does
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # not every drafter follows
                # of this thread alone: what others do to the device (load data, serve) must not undo the capture
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    try:
                        outputs = stage()
                    except BaseException as error:
                        failure = error
                        raise
        except BaseException:
            self._end(graph)
            if failure is None:
                raise
            raise failure  # noqa: B904 - the end of a capture that has failed fails too, and says nothing but that
        return CudaGraph(graph, outputs)

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Do what `CUDAGraph.capture_end` leaves undone when it raises, for torch would count the capture as going on."""
        device = self._stream.device_index
        with contextlib.suppress(RuntimeError):  # it was done, or the capture has never begun
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
            # Torch's allocator of pinned memory goes on asking this graph which streams are its own, so the graph must
            # stay alive; it would also refuse another capture into this pool.
            _failed.append(graph)
            self._pool = torch.cuda.graph_pool_handle()
