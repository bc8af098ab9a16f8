"""Clock, power and temperature of the GPU at work: a chip that waits has its clocks down, so they are read meanwhile."""

from __future__ import annotations

import statistics
import threading
from typing import Any

import torch

EVERY = 0.02  # seconds between readings; NVML's power is an average over up to a second
UNITS = ("SM MHz", "W", "deg C")


def read() -> tuple[float, float, float]:
    """Now, from NVML."""
    return torch.cuda.clock_rate(), torch.cuda.power_draw() / 1e3, torch.cuda.temperature()


class LoadMeter:
    """Entered around the work; `columns` afterwards."""

    def __init__(self, device: str):
        self._readings: list[tuple[float, float, float]] = []
        self._why_not, self._over = None if device == "cuda" else "no GPU", threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> LoadMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def columns(self) -> dict[str, Any]:
        """Medians, or why there are none."""
        if not self._readings:
            return {"load": self._why_not or "nothing was read"}
        return dict(zip(UNITS, map(statistics.median, zip(*self._readings, strict=True)), strict=True))

    def _watch(self) -> None:
        while self._why_not is None and not self._over.wait(EVERY):
            try:
                self._readings.append(read())
            except Exception as error:  # whatever NVML says: times are worth having without
                self._why_not = f"{type(error).__name__}: {error}"
