"""The contract of a drafter: a description, which any number of runs may share, and its run, which owns all that changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Never

from torch import Tensor, nn

from specdec.batch import Batch
from specdec.coins import Coins
from specdec.outcome import Outcome
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec

if TYPE_CHECKING:
    from specdec.models.target import TargetRun


class Drafter(ABC):
    """States which trees it may propose, and begins runs that propose them.

    Nothing of a run is kept on the drafter, so that it may serve several at once, in any number of threads. (Only
    `SuffixDrafter(shared=True)` remembers texts, in a `Memory` that its runs lock.)

    Class attributes:
        states: which of the target's states its runs read: i >= 0 is the residual stream before layer i, -1 the input of the
            LM head.
        models: models that its runs compute with, but for the target's. Captured graphs are dropped when one has changed.
        capturable: whether `propose`, `read` and `commit` of its runs do the same to the device every step: see
            `specdec.engines.graphs`.
    """

    states: tuple[int, ...] = ()
    models: tuple[nn.Module, ...] = ()
    capturable: bool = False

    @abstractmethod
    def spec(self, sampling: Sampling) -> TreeSpec:
        """The trees that may be proposed under this sampling. The rule checks them once, before the first step."""

    @abstractmethod
    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        """Begin a run. Raise ValueError with the cure if this target cannot be drafted for.

        Args:
            target: the target's run.
            batch: the texts, which the target has not read yet; it stays the same object for the whole run.
            last: a run of this drafter that has ended. If `batch.resume`, go on in its caches as far as the texts agree. A
                drafter that can use all tensors of `last` again returns `last`, begun anew, so that what was captured with
                it is replayed.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Never:
        """Raise ValueError. `model.generate` would silently ignore a `custom_generate` that cannot be called."""
        raise ValueError(
            f"a {type(self).__name__} is neither a decoding loop nor a function that makes drafters. To model.generate pass "
            "custom_generate=specdec.custom_generate(drafter); elsewhere pass such a function."
        )


class DraftRun(ABC):
    """A drafter at work on the texts of one run. Override `propose`, and what else it needs to follow the texts."""

    def __init__(self, drafter: Drafter, batch: Batch):
        self.drafter, self.batch = drafter, batch

    def read(self, states: Tensor, start: Tensor, count: Tensor) -> None:  # noqa: B027 - optional
        """Take the target's states, if `Drafter.states` asks for some.

        Called for each chunk of the prompts and for the nodes that each step keeps: in order, for every position from
        `states_known` on that is before the root's, some more than once. After a step `batch.lengths` count its tokens
        already, and `commit` is called next.

        Args:
            states: [batch, n, state, hidden], in the order of `Drafter.states`.
            start: [batch] int64: the position in the text of each row's first state.
            count: [batch] int64 <= n: how many states each row has; the rest is garbage.
        """

    def states_known(self, rows: list[int]) -> dict[int, int]:
        """For each of these rows, which are entered: how many positions need not be passed to `read`; by default 0.

        The beginning of a text may have been read in an earlier turn, in another row or before a batch was halved.
        """
        return dict.fromkeys(rows, 0)

    @property
    def enters(self) -> bool:
        """Whether it can begin texts in some rows while the others go on. If not, `Drafter.start` begins a new run of all."""
        return type(self).enter is not DraftRun.enter

    @property
    def bytes(self) -> int:
        """Bytes of device memory that it holds and the target's run does not: see `TargetRun.bytes`."""
        return 0

    def enter(self, rows: list[int]) -> None:  # noqa: B027 - optional
        """Follow what these rows hold, which the target has read.

        A row holds a new text, or a longer part of one whose prompt is still being read (`left` is 0 until it is whole).
        """

    def reaches(self, row: int, wanted: int) -> int:
        """As for `TargetRun`: how many of the first `wanted` tokens of a row a text that begins with them need not read."""
        return wanted

    @abstractmethod
    def propose(self, coins: Coins) -> DraftTree:
        """Draft trees for the batch, no deeper than `batch.max_depth`. Draw by `coins.picks` only.

        A node's number decides which coins it uses. Nodes at depth `batch.left` or deeper, which the row cannot use, must be
        numbered after all nodes that it can use: else its text would depend on the batch.
        """

    def commit(self, outcome: Outcome) -> None:  # noqa: B027 - optional
        """Follow what was kept of the last proposal. Called after every step.

        `keep` is 0 for rows that had ended or whose prompts are being read, for rows drafted by another drafter (`Fallback`),
        and for all in a pause (`Paused`). In such a step `propose` may not have been called at all.
        """
