"""Captures of stages as CUDA graphs. A capture that fails leaves the process as it was."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch


class CudaGraph:
    """A captured stage.

    Args:
        graph: the stage's operations.
        outputs: what the stage returned; every replay fills the same tensors.
        bytes: by how much its pool of memory has grown.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any, bytes: int):
        self.replay, self.outputs, self.bytes = graph.replay, outputs, bytes


_capturing = threading.Lock()  # torch allows one capture at a time in a process
_failed: list[torch.cuda.CUDAGraph] = []  # kept alive, as `CudaCapture._end` explains


class CudaCapture:
    """Captures stages on a stream of `device`, which need not be the current device, in one pool of memory.

    An error in a stage is raised as it is. A capture executes nothing, so the device stays as it was.
    """

    def __init__(self, device: torch.device):
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, stage: Callable[[], Any]) -> CudaGraph:
        with _capturing:
            before = self._bytes
            graph, outputs = self._captured(stage)
            return CudaGraph(graph, outputs, self._bytes - before)

    @property
    def _bytes(self) -> int:
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self._pool))

    def _captured(self, stage: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph, outputs, failure = torch.cuda.CUDAGraph(), None, None
        try:
            # If `torch.cuda.graph` fails to begin or end, it does not restore the current stream: this `with` does.
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # some drafters do nothing on commit
                # "thread_local", as other threads may use the device (to load data, to serve) during the capture
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
            raise failure  # noqa: B904 - ending the failed capture fails too, with an error that says no more
        return graph, outputs

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Do what `CUDAGraph.capture_end` leaves undone when it raises: else torch takes the capture to go on."""
        device = self._stream.device_index
        with contextlib.suppress(RuntimeError):  # it was done already, or the capture never began
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
            # Torch's allocator of pinned memory still asks this graph for its streams, so the graph must stay alive. That
            # allocator would also refuse another capture into this pool.
            _failed.append(graph)
            self._pool = torch.cuda.graph_pool_handle()
