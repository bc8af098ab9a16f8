"""What a run is asked for: the checked arguments, and the texts to be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specdec.coins import Coins
from specdec.notes import Note
from specdec.processors import Processors
from specdec.sampling import Sampling
from specdec.tree import TreeSpec

if TYPE_CHECKING:
    from specdec.drafters.base import Drafter
    from specdec.engines.base import Engine
    from specdec.huggingface.stopping import Stopping
    from specdec.models.target import Target
    from specdec.rules.base import Rule
    from specdec.runs import Runs


@dataclass(frozen=True, eq=False)
class Text:
    """A text to be written.

    Args:
        index: its place among all that are asked for.
        tokens: [length] int64: its beginning, which is not empty: the prompt, and what was written of it before.
        prompt: how many of these tokens are the prompt.
        left: most tokens that it may still get, at least 1.
        key: what its coins are drawn by, besides the seed.
        step: how many steps it has taken before.
        processors: its logits processors, in their state after `tokens`.
    """

    index: int
    tokens: np.ndarray
    prompt: int
    left: int
    key: int
    step: int = 0
    processors: Processors = field(default_factory=Processors)

    @property
    def longest(self) -> int:
        """Tokens that it may grow to."""
        return len(self.tokens) + self.left


@dataclass(frozen=True, eq=False)
class Written:
    """What has been written of a text; by default nothing.

    Args:
        tokens: [n] int64: the new tokens.
        steps: how many steps it took.
        ended: whether it has ended.
        notes: [tokens of a step, note, ...] of each step, see `Request.notes`; after an interrupt perhaps of one step more
            than `tokens`.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    steps: int = 0
    ended: bool = False
    notes: list[Tensor] = field(default_factory=list)

    @property
    def noted(self) -> Tensor:
        """[n, note, ...]: what was noted of each token; of a text without tokens nothing."""
        return torch.cat(self.notes)[: len(self.tokens)] if self.notes else torch.empty(0)


@dataclass(frozen=True, eq=False)
class Request:
    """The checked arguments of a run; see also `specdec.generate`.

    Args:
        target, drafter, rule, engine: the parts.
        sampling: with every field filled in.
        spec: the trees that may be proposed.
        first_index: index of the first prompt; errors name prompts by it.
        num_samples: how many texts each prompt gets.
        count: how many texts were asked for, those that cannot be decoded included.
        texts: all that are to be written; their indices may leave places out.
        written: texts of earlier calls, by index: some have ended, and of the others `texts` holds what is there.
        skipped: why prompts cannot be decoded, by the indices of their texts.
        slots: rows of a batch; None: as many as there are texts, none of which moves to another row.
        stop_tokens: ids that end a text.
        stopping: called after every step to end rows; None if only stop tokens and budgets end them.
        tokenizer: as given; None if there is none.
        seed: the seed of all coins.
        trace: what to record.
        notes: what to note of every new token; see `specdec.notes`.
        last: the runs of an earlier turn to go on from, if there was one.
        keep: whether a later turn may go on from this run.
        coins: (batch, nodes) -> Coins, in place of coins made from the seed; None: from the seed.
        began: when the call began, by `time.perf_counter`.
    """

    target: Target
    drafter: Drafter
    rule: Rule
    engine: Engine
    sampling: Sampling
    spec: TreeSpec
    first_index: int
    num_samples: int
    count: int
    texts: Sequence[Text]
    written: Mapping[int, Written]
    skipped: Mapping[int, str]
    slots: int | None
    stop_tokens: tuple[int, ...]
    stopping: Stopping | None
    tokenizer: Any
    seed: int
    trace: str
    notes: tuple[Note, ...]
    last: Runs | None
    keep: bool
    coins: Callable[[int, int], Coins] | None
    began: float

    @property
    def largest_tree(self) -> int:
        """Most slots that a tree takes in the cache. Paths may be `depth` long even if that is more than `nodes` allows."""
        return max(self.spec.nodes, self.spec.depth + 1)

    @property
    def static(self) -> bool:
        """Whether the drafter's stages are captured, and so use no host values."""
        return self.engine.static_shapes and self.drafter.capturable

    def reasons(self) -> dict[str, str | None]:
        """Why each stage of a step cannot be captured; None where it can."""
        drafts = None if self.drafter.capturable else f"{self.drafter} drafts on the host"
        scores = None if self.target.capturable else f"{self.target} is not capturable"
        decides = None if self.rule.capturable else f"{type(self.rule).__name__} decides on the host"
        if any(text.processors for text in self.texts):
            decides = "logits processors depend on the text"
        if self.trace != "summary":
            decides = f"trace={self.trace!r} looks at every law"
        return {"propose": drafts, "score": scores, "decide": decides, "commit": drafts}
