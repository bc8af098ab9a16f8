"""Times between marks: of the host, or on CUDA of the device, which is still at work when the host goes on."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given: what the host times ends there."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Clock:
    """The times of one step."""

    def __init__(self, device: torch.device):
        self._device, self._on_device, self._marks = device, device.type == "cuda", []
        self.mark()

    def mark(self) -> None:
        """What was begun after the last mark ends here."""
        if self._on_device:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record(torch.cuda.current_stream(self._device))
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between one mark and the next; on CUDA, waits for the last."""
        if not self._on_device:
            return [b - a for a, b in pairwise(self._marks)]
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._marks)]
