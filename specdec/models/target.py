"""Targets score trees. `ModelTarget` makes one of any unmodified Hugging Face causal LM that is supported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch import Batch
from specdec.models.cache import TreeCache
from specdec.models.cached_model import CachedModel
from specdec.models.causal_lm import CausalLM
from specdec.models.path_probe import check_text
from specdec.models.prepared_inputs import preparer_name
from specdec.outcome import Outcome
from specdec.tree import DraftTree

if TYPE_CHECKING:
    from specdec.drafters.base import DraftRun


@dataclass(frozen=True, eq=False)
class Scores:
    """What the target says of a tree.

    Args:
        logits: [batch, node, vocab]: the logits after the path to each node.
        states: [batch, node, state, hidden]: the states there; None if the drafter asks for none.
    """

    logits: Tensor
    states: Tensor | None = None


class Target(ABC):
    """The contract of a target. It may serve any number of runs at once.

    Subclass it, and `TargetRun`, to decode from something that is not a transformers model.

    Class attributes:
        vocab: size of the vocabulary: the last axis of the logits.
        context_length: longest text it can read, in tokens; None if unbounded.
        context_reason: words to put after that number when a longer text is refused, as in " (beyond it ...)".
        device: where its logits are.
        stop_tokens: ids that end a text unless generate(stop_tokens=...) says otherwise.
        model: the transformers model, if it is made of one.
        capturable: whether `score` and `commit` of its runs do the same to the device every step.
    """

    vocab: int
    context_length: int | None = None
    context_reason: str = ""
    device: torch.device = torch.device("cpu")
    stop_tokens: int | Sequence[int] | None = None
    model: PreTrainedModel | None = None
    capturable: bool = False

    @abstractmethod
    def start(self, batch: Batch, states: Sequence[int] = (), last: TargetRun | None = None) -> TargetRun:
        """Begin a run, before any prompt is read.

        Args:
            batch: the texts; it stays the same object for the whole run. `batch.capacity` has room for the longest text and the
                largest tree together.
            states: which of its states the drafter reads: see `Drafter.states`. ValueError if there are no such states.
            last: a run of this target that has ended; used as in `Drafter.start`.
        """

    def check_text(self, text: list[int]) -> None:  # noqa: B027 - optional
        """Raise ValueError if the target reads something else in place of this text. Called again when a text has ended."""


class TargetRun(ABC):
    """A target at work on the texts of one run."""

    def __init__(self, target: Target, batch: Batch):
        self.target, self.batch = target, batch

    @property
    def enters(self) -> bool:
        """Whether it can begin texts in some rows while the others go on. If not, `Target.start` begins a new run of all."""
        return type(self).enter is not TargetRun.enter

    @property
    def bytes(self) -> int:
        """Bytes of device memory that it holds: an engine that keeps it for later runs counts them."""
        return 0

    def enter(self, rows: list[int], draft: DraftRun) -> None:  # noqa: B027 - optional
        """Read what these rows hold, but for their roots, and pass the states to `draft.read` if the drafter asks.

        Called when a text begins in a row, again for each further part of a long prompt (`left` is 0 until it is whole), and
        for all rows when a drafter is begun anew.
        """

    def reaches(self, row: int, wanted: int) -> int:
        """How many of the first `wanted` tokens of a row a text that begins with them need not read."""
        return wanted

    @abstractmethod
    def score(self, tree: DraftTree) -> Scores:
        """The logits after the path to each node, and the states there if the drafter asks for some."""

    def commit(self, outcome: Outcome) -> None:  # noqa: B027 - optional
        """Keep the accepted nodes; called after every `score`."""


class ModelTarget(Target):
    """A Hugging Face causal LM as target.

    Args:
        model: any supported causal LM, in eval mode; it is left as it is found.
        cache: the kind of its KV cache. A cache that rounds keys and values changes the model's law; drafting changes it no
            further.

    Raises:
        UnsupportedModel: trees cannot be scored with the model; the message says why.
    """

    capturable = True

    def __init__(self, model: PreTrainedModel, cache: type[TreeCache] = TreeCache):
        self.lm = CausalLM(model, cache)
        self.model, self.vocab, self.device = model, self.lm.vocab, self.lm.device
        self.context_length, self.context_reason = self.lm.context_length, self.lm.context_reason
        self.stop_tokens = None if model.generation_config is None else model.generation_config.eos_token_id

    def __repr__(self) -> str:
        return f"ModelTarget({type(self.model).__name__}, {self.lm.cache.__name__})"

    def __eq__(self, other: object) -> bool:
        """Whether it does the same: made of the same model, with a cache of the same kind. A subclass equals but itself."""
        if type(self) is not ModelTarget or type(other) is not ModelTarget:
            return self is other
        return self.lm.kind == other.lm.kind

    def __hash__(self) -> int:
        return hash(self.lm.kind)

    def check_text(self, text: list[int]) -> None:
        if not preparer_name(self.lm.model).startswith("transformers."):
            check_text(self.lm.model, text[:-1])  # the last token is never read

    def start(self, batch: Batch, states: Sequence[int] = (), last: TargetRun | None = None) -> TargetRun:
        last = last if isinstance(last, ModelTargetRun) else None
        cached = self.lm.start(
            len(batch), batch.capacity, batch.largest_tree, states, last and last.cached, marks=batch.keep
        )
        if last is not None and last.batch is batch and last.cached is cached:
            return last
        return ModelTargetRun(self, batch, cached)


class ModelTargetRun(TargetRun):
    """A Hugging Face causal LM at work. Drafters that draft with the target itself share its cache."""

    def __init__(self, target: ModelTarget, batch: Batch, cached: CachedModel):
        super().__init__(target, batch)
        self.cached = cached

    @property
    def bytes(self) -> int:
        return self.cached.cache.bytes

    def enter(self, rows: list[int], draft: DraftRun) -> None:
        for row in rows:
            check_text(self.cached.lm.model, self.batch.text(row).tolist())
        self.cached.enter(self.batch, rows, draft)

    def reaches(self, row: int, wanted: int) -> int:
        return self.cached.cache.reaches(row, self.batch.host_lengths[row] - 1, wanted)

    def score(self, tree: DraftTree) -> Scores:
        logits = self.cached.forward(tree.tokens, tree.topology, self.batch.longest - 1)
        return Scores(logits, self.cached.states)

    def commit(self, outcome: Outcome) -> None:
        self.cached.cache.keep(outcome.path, outcome.keep)
