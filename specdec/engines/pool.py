"""What ended runs give back: memory that later runs of the same kind take."""

from __future__ import annotations

import threading
import warnings
from typing import Any, NamedTuple, Protocol

_SHARE = 4  # by default, parts of ended runs take at most one such part of their device's memory


class Parts(Protocol):
    """What a run owned."""

    @property
    def bytes(self) -> int:
        """Bytes of device memory that are free once it is dropped."""
        ...

    @property
    def device_memory(self) -> int | None:
        """Bytes of memory that its device has; None where it is not known."""
        ...


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
        size, limit, memory = parts.bytes, self._limit, parts.device_memory
        if limit is None:
            limit = self.bytes + size if memory is None else memory // _SHARE
        if size > limit:
            if limit:  # 0 asks for it
                warnings.warn(
                    f"engine: what this run owned takes {size:,} bytes and is not kept for the next one, as all that "
                    f"is kept may take {limit:,}: a run of its kind captures anew. Raise Graphs(pool_bytes=...) to keep it.",
                    stacklevel=2,
                )
            return
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
