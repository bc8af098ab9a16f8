"""Which tensors Hopper's copy engine (TMA) may be asked to read, and in which order of their axes."""

from __future__ import annotations

from itertools import pairwise

UNIT = 16  # bytes, of addresses and strides
LONGEST = 1 << 40  # bytes, of a stride

Axes = tuple[int, int, int, int]
BY_HEAD: Axes = (0, 1, 2, 3)
BY_SLOT: Axes = (0, 2, 1, 3)  # as the cache lies in memory: the heads of a slot stand together


def axes(strides: tuple[int, ...], item: int, address: int) -> Axes | None:
    """The order in which a descriptor takes the axes of keys or values [batch, head, slot, dim]; None if it cannot.

    CUDA wants each stride to be a multiple of the one of the next inner axis (`cuTensorMapEncodeTiled`). Drivers have been
    seen to accept others, but do not promise to.

    Args:
        strides: of the four axes, in elements.
        item: bytes of an element.
        address: of the first element.
    """
    *outer, inner = strides
    fits = inner == 1 and address % UNIT == 0 and all(s * item % UNIT == 0 and s * item < LONGEST for s in outer)
    return next((order for order in (BY_HEAD, BY_SLOT) if fits and _nested([strides[axis] for axis in order])), None)


def _nested(strides: list[int]) -> bool:
    return all(a >= b > 0 and a % b == 0 for a, b in pairwise(strides))
