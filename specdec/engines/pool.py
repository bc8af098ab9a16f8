"""What ended runs give back: memory that later runs of the same kind take."""

from __future__ import annotations

import math
import threading
import warnings
from collections import deque
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
    limit: float  # of all that are idle when it comes


class Pool:
    """The parts of ended runs, within a limit. Any thread may use it; whatever it hands out, it hands out once.

    Python may end a run, which adds its parts, at any line of any thread: when it collects a stream that was left. So nobody
    waits for the lock to add parts. Who holds it puts in what was added in the meantime, and no key is compared meanwhile.

    Args:
        limit: most bytes of all parts together; None: a quarter of the memory of their device.
    """

    def __init__(self, limit: int | None):
        self._limit, self._lock = limit, threading.Lock()
        self._idle: list[_Idle] = []  # the oldest come first
        self._added: deque[_Idle] = deque()

    @property
    def bytes(self) -> int:
        return sum(idle.bytes for idle in self._waiting())

    def take(self, key: Any) -> Any:
        """The parts of this key that were given back last, which are no longer here; None if there are none."""
        for idle in reversed(self._waiting()):
            if idle.key == key and self._removed(idle):
                return idle.parts
        return None

    def add(self, key: Any, parts: Parts) -> None:
        """Keep the parts of a run that has ended, and drop the oldest as far as all take more than the limit."""
        size, limit, memory = parts.bytes, self._limit, parts.device_memory
        if limit is None:
            limit = math.inf if memory is None else memory // _SHARE
        if size <= limit:
            self._added.append(_Idle(key, parts, size, limit))
            self._settle()
        elif limit:  # 0 asks for it
            warnings.warn(
                f"engine: what this run owned takes {size:,} bytes and is not kept for the next one, as all that "
                f"is kept may take {limit:,}: a run of its kind captures anew. Raise Graphs(pool_bytes=...) to keep it.",
                stacklevel=2,
            )

    def clear(self) -> bool:
        """Drop all parts; whether there were any."""
        return sum(map(self._removed, self._waiting())) > 0

    def _waiting(self) -> list[_Idle]:
        self._settle()
        with self._lock:
            found = [*self._idle]
        self._settle()
        return found

    def _removed(self, idle: _Idle) -> bool:
        """Whether it was still here."""
        with self._lock:
            places = [place for place, other in enumerate(self._idle) if other is idle]
            for place in places:
                del self._idle[place]
        self._settle()
        return bool(places)

    def _settle(self) -> None:
        """Put in what was added, unless somebody who holds the lock will."""
        while self._added and self._lock.acquire(blocking=False):
            dropped = []  # freed after the lock is
            try:
                while self._added:
                    self._idle.append(self._added.popleft())
                while sum(idle.bytes for idle in self._idle) > self._idle[-1].limit:
                    dropped.append(self._idle.pop(0))
            finally:
                self._lock.release()
