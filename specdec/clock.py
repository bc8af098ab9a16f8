"""Times between marks: by the host's clock, or on CUDA by the device's, as the host runs ahead of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch

_NOW: ContextVar[Callable[[], float] | None] = ContextVar("now", default=None)


@contextmanager
def told_by(now: Callable[[], float]) -> Iterator[None]:
    """Inside, this function tells the host's seconds to every `Clock` of this thread, instead of `time.perf_counter`.

    `time.thread_time` does not count what other processes take of the core.
    """
    token = _NOW.set(now)
    try:
        yield
    finally:
        _NOW.reset(token)


def host_seconds() -> float:
    """The host's clock, as it is told here."""
    now = _NOW.get()
    return time.perf_counter() if now is None else now()


def finish(device: torch.device) -> None:
    """Wait for the device to finish, before the host reads its clock."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Clock:
    """The times of one step."""

    def __init__(self, device: torch.device):
        self._device, self._on_device, self._marks = device, device.type == "cuda", []
        self.mark()

    def mark(self) -> None:
        """End the interval that the last mark began."""
        if self._on_device:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record(torch.cuda.current_stream(self._device))
        else:
            self._marks.append(host_seconds())

    def seconds(self) -> list[float]:
        """The length of each interval between two marks; on CUDA it waits for the last mark."""
        if not self._on_device:
            return [b - a for a, b in pairwise(self._marks)]
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._marks)]
