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
    """Says what trees are proposed for every row, each step, and begins runs that propose them.

    Nothing of a run is kept on the drafter, so that it may serve several at once, in any number of threads.
    """

    # Which of the target's states its runs read: i >= 0 is the residual stream before layer i, -1 what the LM head reads.
    states: tuple[int, ...] = ()
    # Models that its runs compute with, but for the target's: what is captured of a run holds while these stay as they are.
    models: tuple[nn.Module, ...] = ()
    # True if `propose`, `read` and `commit` of its runs do the same to the device every step: see `specdec.engines.graphs`.
    capturable: bool = False

    @abstractmethod
    def spec(self, sampling: Sampling) -> TreeSpec:
        """What trees may be proposed under this sampling: checked against the rule once, before the first step."""

    @abstractmethod
    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        """Begin a run. Raise ValueError with the cure if this target cannot be drafted for.

        Args:
            target: the target's run.
            batch: the texts, which the target has not read yet; it stays the same object for the whole run.
            last: a run of this drafter that has ended. Go on in its caches if `batch.resume`, as far as the texts agree. A
                drafter whose new run lies in the very tensors of `last` returns `last`, begun anew: then what was captured
                with it is replayed.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Never:
        """Refused. It is here because `model.generate` ignores a `custom_generate` that cannot be called, in silence."""
        raise ValueError(
            f"a {type(self).__name__} is neither a decoding loop nor a function; to model.generate pass "
            "custom_generate=specdec.custom_generate(drafter), and where a function that makes one is wanted, that function."
        )


class DraftRun(ABC):
    """A drafter at work on the texts of one run. Override `propose`, and what else it needs to follow the texts."""

    def __init__(self, drafter: Drafter, batch: Batch):
        self.drafter, self.batch = drafter, batch

    def read(self, states: Tensor, start: Tensor, count: Tensor) -> None:  # noqa: B027 - optional
        """The target's states, if `Drafter.states` asks for some: of the prompts, chunk by chunk, and of what each step keeps.

        Every position before the root's is told, in order: from `states_known` on, once or again. After a step `batch.lengths`
        count the step's tokens already, and `commit` comes next.

        Args:
            states: [batch, n, state, hidden], in the order of `Drafter.states`.
            start: [batch] int64: position in the text of each row's first state.
            count: [batch] int64 <= n: how many of them there are; what stands behind them is garbage.
        """

    def states_known(self) -> list[int]:
        """How many positions of each row need not be told to `read`, as an earlier turn has kept them: by default none."""
        return [0] * len(self.batch)

    def enter(self, rows: list[int]) -> None:  # noqa: B027 - optional
        """These rows hold new prompts now, which the target has read."""

    @abstractmethod
    def propose(self, coins: Coins) -> DraftTree:
        """Draft trees for the batch, no deeper than `batch.max_depth`. Draw by `coins.picks` only.

        A node's number decides which coins are its own. So that a row's text does not depend on its batch, nodes at depth
        `batch.left` or deeper must not take numbers before those of nodes that the row can use.
        """

    def commit(self, outcome: Outcome) -> None:  # noqa: B027 - optional
        """What was kept of the last proposal; called after every step. Also called, with `keep` = 0, for rows that had ended,
        for rows that another drafter drafted for (`Fallback`), and for all where none did (`Paused`), when `propose` may not
        even have been called.
        """
