"""Coins: the only randomness in the package.

A coin is a uniform number in [0, 1) that is a pure function of its key: (seed, text, step, purpose, node), where steps are
counted from the text's own first. Nothing is consumed in order, so a text's stream depends on nothing but its own key: not on
its row, on what else is in the batch, or on when it was begun. The scalar face (specifications, the certifier) and the
batched face (fast paths, graphs) read the very same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from specdec.checks import as_int, as_seed
from specdec.laws import normalised
from specdec_kernels.reference.inverse_cdf import inverse_cdf

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio as a signed 64-bit integer (SplitMix64's increment)
_BLOCK = 32  # steps tabulated at once, so that hashing costs nothing per step


class Purpose(IntEnum):
    """What a coin decides. Coins of different purposes are independent."""

    DRAFT = 0  # the token of the node that the coin belongs to
    ACCEPT = 1  # whether that node is accepted
    EMIT = 2  # the recovered or bonus token emitted at that node


class Coins:
    """Uniforms for a batch, addressed by (row, purpose, node).

    Args:
        seed: an integer of 64 bits, from -2**63 to 2**64 - 1; the same seed gives the same coins.
        batch: number of rows.
        nodes: size of the largest tree, the root included.
        device: where the tensors of the batched face are.

    Attributes:
        keys: what each row's coins are drawn by, besides the seed; row b begins with key b.
        steps: each text's own step.
    """

    enumerates = False  # True for coins that follow every outcome: rules then run their scalar specification

    def __init__(self, seed: int, batch: int, nodes: int, device: torch.device | str = "cpu"):
        self.batch, self.nodes = as_int("batch", batch, 1), as_int("nodes", nodes, 1)
        self.device = torch.device(device)
        self._current = torch.empty(len(Purpose), self.batch, self.nodes, dtype=torch.float64, device=self.device)
        self.begin(seed, range(self.batch), [0] * self.batch)

    def begin(self, seed: int, keys: Sequence[int], steps: Sequence[int]) -> None:
        """Begin again with another seed, and give all rows to texts with these keys, at these steps of theirs."""
        self._seed = (as_seed(seed) + 2**63) % 2**64 - 2**63  # with a sign, as torch's integers have
        self.enter(range(self.batch), keys, steps)

    def enter(self, rows: Sequence[int], keys: Sequence[int], steps: Sequence[int]) -> None:
        """Give rows to texts with these keys, at these steps of theirs."""
        given = dict(zip(rows, zip(keys, steps, strict=True), strict=True))
        now = [given.get(row) or (self.keys[row], self.steps[row]) for row in range(self.batch)]
        self.keys, self.steps = [key for key, _ in now], [step for _, step in now]
        self._tabulate()

    def advance(self) -> None:
        """Go on to every text's next step."""
        self.steps = [step + 1 for step in self.steps]
        self._offset += 1
        if self._offset == len(self._table):
            self._tabulate()
        else:
            self._current.copy_(self._table[self._offset])

    def _tabulate(self) -> None:
        """Compute the coins of the next steps, and write those of this one where captured graphs read them."""
        self._table = _table(self._seed, self.keys, self.steps, self.nodes, self.device)
        self._offset = 0
        self._current.copy_(self._table[0])

    def uniforms(self, purpose: Purpose) -> Tensor:
        """This step's coins of one purpose: [batch, node] float64 in [0, 1)."""
        return self._current[purpose]

    def picks(self, nodes: range, weights: Tensor) -> Tensor:
        """Draw the tokens of some nodes, each with its own coin.

        Args:
            nodes: indices in the tree of the nodes whose tokens are drawn.
            weights: [batch, len(nodes), vocab] unnormalised and non-negative.

        Returns:
            [batch, len(nodes)] int64, by inverse CDF in index order. Tokens of weight 0 are never drawn (where all
            weights are 0 the result is arbitrary, but a token).
        """
        coins = self.uniforms(Purpose.DRAFT)[:, nodes.start : nodes.stop : nodes.step]
        return inverse_cdf(weights, coins).clamp_(max=weights.shape[-1] - 1)

    def row(self, row: int) -> RowCoins:
        """The scalar face of one row."""
        return RowCoins(self, row)


class RowCoins:
    """One row's coins, one at a time: what a rule's specification flips."""

    def __init__(self, coins: Coins, row: int):
        self._coins, self._row = coins, row

    def _uniform(self, purpose: Purpose, node: int) -> float:
        return float(self._coins.uniforms(purpose)[self._row, node])

    def accept(self, node: int, probability: float) -> bool:
        """True with the given probability (values above 1 by rounding count as 1)."""
        return self._uniform(Purpose.ACCEPT, node) < probability

    def pick(self, node: int, probabilities: np.ndarray, purpose: Purpose = Purpose.EMIT) -> int:
        """An index drawn from `probabilities` [vocab] by inverse CDF in index order; never one of probability 0."""
        cdf = np.cumsum(np.asarray(probabilities, dtype=np.float64))
        threshold = min(self._uniform(purpose, node) * cdf[-1], np.nextafter(cdf[-1], 0))
        return int(np.searchsorted(cdf, threshold, side="right"))

    def normalise(self, weights: np.ndarray) -> np.ndarray:
        """The law of `weights` [vocab] in the arithmetic of these coins: float64 here, fractions when enumerating."""
        return normalised(weights)


def _table(seed: int, keys: Sequence[int], steps: Sequence[int], nodes: int, device: torch.device) -> Tensor:
    """[_BLOCK, purpose, batch, node] float64 uniforms: for each text, those of its step and the ones after it."""

    def axis(values: Iterable[int], dim: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        return torch.tensor([*values], device=device).view(shape)

    state = _mix(torch.tensor(seed, device=device))
    step = axis(range(_BLOCK), 0) + axis(steps, 2)
    for field in (axis(keys, 2), step, axis(range(len(Purpose)), 1), axis(range(nodes), 3)):
        state = _mix(state + (field + 1) * _GOLDEN)
    return _shift(state, 11).double() * 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift of int64 is arithmetic; hashing needs the logical one


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of int64 with full avalanche."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)
