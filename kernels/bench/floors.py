"""The least time a chip needs for tree attention: what must be read, multiplied and exponentiated, at measured rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Shape:
    """One call on 16-bit keys and values; every row has the same prefix."""

    model: str
    heads: int
    kv_heads: int
    head_dim: int
    nodes: int
    length: int
    batch: int
    softcap: float | None = None
    window: int | None = None

    @property
    def seen(self) -> int:
        """Slots of each row that some node sees."""
        return self.nodes + min(self.length, self.window or self.length)

    @property
    def cache_bytes(self) -> int:
        """Keys and values that must be read once."""
        return 2 * 2 * self.batch * self.seen * self.kv_heads * self.head_dim

    @property
    def bytes(self) -> int:
        """With queries and outputs."""
        return self.cache_bytes + 2 * 2 * self.batch * self.nodes * self.heads * self.head_dim

    @property
    def flops(self) -> int:
        """Of both products, unseen tree nodes included."""
        return 4 * self.batch * self.nodes * self.heads * self.head_dim * self.seen

    @property
    def exponentials(self) -> int:
        """Of the softmax."""
        return self.batch * self.nodes * self.heads * self.seen


class Rates(NamedTuple):
    """What a chip does in a second at best."""

    bytes: float
    flops: float  # bf16, dense
    exponentials: float


# Of an H200: copy bandwidth and matrix rate as measured on random data, 16 exponentials a clock and multiprocessor.
RATES = {"NVIDIA H200": Rates(4.3e12, 790e12, 4.2e12)}


def floor(shape: Shape, rates: Rates) -> float:
    """Seconds: the slowest of the three, were everything else free and the three overlapped."""
    pairs = ((shape.bytes, rates.bytes), (shape.flops, rates.flops), (shape.exponentials, rates.exponentials))
    return max(amount / rate for amount, rate in pairs)
