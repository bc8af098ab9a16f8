"""The programs of a launch in Triton's interpreter, which runs them one after the other, in another order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from triton.runtime.interpreter import interpreter_builder


@contextlib.contextmanager
def backwards() -> Iterator[None]:
    """The last program comes first."""
    place = interpreter_builder.set_grid_idx

    def opposite(*index: int) -> None:
        place(*(size - 1 - i for size, i in zip(interpreter_builder.grid_dim, index, strict=True)))

    with mock.patch.object(interpreter_builder, "set_grid_idx", opposite):
        yield
