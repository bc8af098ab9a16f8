"""Times between marks: by the host's clock, or on CUDA by the device's, as the host runs ahead of the device."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


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
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The length of each interval between two marks; on CUDA it waits for the last mark."""
        if not self._on_device:
            return [b - a for a, b in pairwise(self._marks)]
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._marks)]
