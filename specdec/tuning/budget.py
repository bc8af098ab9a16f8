"""The time that a search may take, and its bar."""

from __future__ import annotations

import time
from collections.abc import Callable

from specdec.checks import as_float


class Budget:
    """So many seconds from now, by the wall clock.

    >>> with Budget(60) as budget:
    ...     measuring = budget.until(0.5)
    ...     while not measuring():
    ...         ...

    Args:
        seconds: how many.
        shown: whether there is a bar.
        now: the clock.
    """

    def __init__(self, seconds: float, shown: bool = False, now: Callable[[], float] = time.perf_counter):
        from tqdm.auto import tqdm  # here, as few need it

        self.seconds, self._now = as_float("seconds", seconds, "(0, inf)"), now
        self._began = now()
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
        self._bar = tqdm(total=self.seconds, disable=not shown, bar_format=form, desc="tune")

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return self._now() - self._began

    def until(self, share: float) -> Callable[[], bool]:
        """A function that tells whether this share of all the time is over; every call moves the bar."""
        end = share * self.seconds

        def over() -> bool:
            spent = self.spent
            self._bar.update(min(spent, self.seconds) - self._bar.n)
            return spent >= end

        return over

    def say(self, what: str) -> None:
        """Tell what is being done."""
        self._bar.set_postfix_str(f"{what}", refresh=True)

    def __enter__(self) -> Budget:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
