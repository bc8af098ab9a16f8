"""What ended runs give back: memory that later runs of the same kind take."""

from __future__ import annotations

import threading
import warnings
from typing import Any, NamedTuple, Protocol

import torch

from specdec.models.memory import all_memory

_SHARE = 4  # by default, parts of ended runs take at most one such part of their device's memory


class Parts(Protocol):
    """What a run owned."""

    @property
    def bytes(self) -> int:
        """Bytes of device memory that are free once it is dropped."""
        ...

    @property
    def device(self) -> torch.device: ...


class _Idle(NamedTuple):
    key: Any
    parts: Parts
    bytes: int


class Pool:
    """The parts of ended runs, within a limit. Any thread may use it; whatever it hands out, it hands out once.

    Args:
        limit: most bytes of all parts together; None: a quarter of the memory of their device.
    """

    def __init__(self, limit: int | None):
        self._limit, self._lock = limit, threading.Lock()
        self._idle: list[_Idle] = []  # the oldest come first

    @property
    def bytes(self) -> int:
        with self._lock:
            return self._total

    @property
    def _total(self) -> int:
        return sum(idle.bytes for idle in self._idle)

    def take(self, key: Any) -> Any:
        """The parts of this key that were given back last, which are no longer here; None if there are none."""
        with self._lock:
            places = [place for place, idle in enumerate(self._idle) if idle.key == key]
            return self._idle.pop(places[-1]).parts if places else None

    def add(self, key: Any, parts: Parts) -> None:
        """Keep the parts of a run that has ended, and drop the oldest as far as all take more than the limit."""
        size, limit = parts.bytes, self._limit
        if limit is None:
            memory = all_memory(parts.device)
            limit = size if memory is None else memory // _SHARE
        if size > limit > 0:
            warnings.warn(
                f"engine: what this run owned takes {size:,} bytes and is not kept for the next one, as all that is kept may "
                f"take {limit:,}: a run of its kind allocates and captures anew. Raise Graphs(pool_bytes=...) to keep it.",
                stacklevel=2,
            )
        dropped = []  # freed after the lock is
        with self._lock:
            self._idle.append(_Idle(key, parts, size))
            while self._total > limit:
                dropped.append(self._idle.pop(0))

    def clear(self) -> bool:
        """Drop all parts; whether there were any."""
        with self._lock:
            dropped, self._idle = self._idle, []
        return bool(dropped)
