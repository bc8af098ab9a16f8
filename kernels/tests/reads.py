"""What kernels read, counted in Triton's interpreter: loops as often as they are gone through, which no binary says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from triton.runtime.interpreter import interpreter_builder


class Launch(list[list[int]]):
    """Of each program the elements of each of its loads, in order."""

    @property
    def elements(self) -> int:
        return sum(map(sum, self))

    @property
    def in_series(self) -> int:
        """Loads of the program that has most."""
        return max(map(len, self))


@contextlib.contextmanager
def counted() -> Iterator[list[Launch]]:
    """The launches inside."""
    launches: list[Launch] = []
    launch, begin, load = (
        getattr(interpreter_builder, name) for name in ("set_grid_dim", "set_grid_idx", "create_masked_load")
    )

    def launched(*sizes: int) -> None:
        launches.append(Launch())
        launch(*sizes)

    def begun(*index: int) -> None:
        launches[-1].append([])
        begin(*index)

    def loaded(pointers: Any, mask: Any, *options: Any) -> Any:
        launches[-1][-1].append(int(mask.data.sum()))
        return load(pointers, mask, *options)

    with mock.patch.multiple(interpreter_builder, set_grid_dim=launched, set_grid_idx=begun, create_masked_load=loaded):
        yield launches
