"""The least time a chip needs for an op: what must be moved, multiplied and exponentiated, at rates that others measured."""

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


@dataclass(frozen=True)
class Laws:
    """One call of `law` or `verify` on 16-bit logits of trees in which every node has `width` children, as far as they go."""

    op: str
    sampling: str  # a name in `verification.SAMPLINGS`
    children: str  # name of the law that they were drawn from
    batch: int
    nodes: int = 64
    vocab: int = 128256  # of Llama 3
    width: int = 4
    flops = 0

    @property
    def internal(self) -> int:
        """Nodes that have children."""
        return (self.nodes - 2) // self.width + 1

    @property
    def depth(self) -> int:
        """Longest path, in edges."""
        depth, node = 0, self.nodes - 1
        while node > 0:
            depth, node = depth + 1, (node - 1) // self.width
        return depth

    @property
    def bytes(self) -> int:
        """Logits of all nodes, and float32 laws of all drawn children: which nodes are visited shows when it is too late."""
        drafted = self.op == "verify" and self.children != "POINT"
        return self.batch * self.vocab * (2 * self.nodes + drafted * 4 * self.internal)

    @property
    def exponentials(self) -> int:
        """Of the softmax."""
        return 0 if self.sampling == "greedy" else self.batch * self.nodes * self.vocab


@dataclass(frozen=True)
class Compaction:
    """One call of `compact` on a 16-bit cache of `layers` keys and as many values; every row keeps `kept` nodes."""

    op: str
    batch: int
    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    kept: int = 8  # the root among them, which is in its place already
    flops = exponentials = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return 2 * 2 * 2 * self.layers * self.batch * (self.kept - 1) * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Recurrence:
    """One call of an op on float32 states, of the size of a layer of Qwen3-Next-80B, and a fold of `kept` nodes."""

    op: str
    batch: int
    nodes: int = 16  # that read; 0: a fold alone
    kept: int = 6
    heads: int = 32
    key_heads: int = 16
    dim: int = 128
    value_dim: int = 128
    exponentials = 0

    @property
    def reads(self) -> int:
        """Products with the state to a node: the delta rule looks up keys too."""
        return 2 if self.op == "gated_delta" else 1

    @property
    def bytes(self) -> int:
        """States, read and written; keys and values of all nodes; queries, results and updates of those that read."""
        nodes = self.nodes + self.kept
        keys, values = nodes + self.nodes, nodes + self.reads * self.nodes
        moved = keys * self.key_heads * self.dim + values * self.heads * self.value_dim
        return 4 * self.batch * (2 * self.heads * self.dim * self.value_dim + moved)

    @property
    def flops(self) -> int:
        """In units of bf16: a product of float32 takes three of tf32, each of which takes twice as long."""
        states = (self.reads * self.nodes + self.kept) * self.dim * self.value_dim
        pairs = self.reads * self.nodes**2 * (self.dim + self.value_dim) // 2
        return 6 * 2 * self.batch * self.heads * (states + pairs)


@dataclass(frozen=True)
class Product:
    """One call of `linear_int8` or `linear_int4`, by default on a matrix of the MLP of Llama 3 8B."""

    op: str
    tokens: int
    out: int = 14336
    inputs: int = 4096
    exponentials = 0

    @property
    def bytes(self) -> int:
        """What is stored, with its scales, and float32 inputs and outputs."""
        weights = self.out * self.inputs
        stored = weights + 4 * self.out if self.op == "linear_int8" else weights // 2 + 4 * weights // 32
        return stored + 4 * self.tokens * (self.inputs + self.out)

    @property
    def flops(self) -> int:
        """In units of bf16: products of integers take half as long."""
        return self.tokens * self.out * self.inputs


Work = Shape | Laws | Compaction | Recurrence | Product


class Rates(NamedTuple):
    """What a chip does in a second at best."""

    bytes: float
    flops: float  # bf16, dense
    exponentials: float


# Of an H200: copy bandwidth and matrix rate as measured on random data, 16 exponentials a clock and multiprocessor.
RATES = {"NVIDIA H200": Rates(4.3e12, 790e12, 4.2e12)}


def floor(shape: Work, rates: Rates) -> float:
    """Seconds: the slowest of the three, were everything else free and the three overlapped."""
    pairs = ((shape.bytes, rates.bytes), (shape.flops, rates.flops), (shape.exponentials, rates.exponentials))
    return max(amount / rate for amount, rate in pairs)
