"""A Hugging Face causal LM over rows of different lengths: it reads texts and scores tree nodes.

Targets and draft models both run in it. A `CausalLM` is a model and what was found out about it, and may be shared;
`CachedModel` is one run of it, and owns its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch import Batch
from specdec.models.attention import NAME, View
from specdec.models.cache import TreeCache, cache_argument
from specdec.models.compilation import Compiled
from specdec.models.context_limit import context_limit_of
from specdec.models.fingerprint import fingerprint
from specdec.models.prepared_inputs import takes
from specdec.models.probe import autocast_dtype, check_ready, device_of, embedding, layout_of, score_probe_tree
from specdec.models.routing import Route
from specdec.models.states import Capture
from specdec.tree import Topology, chain

if TYPE_CHECKING:
    from specdec.drafters.base import DraftRun

_TOKENS = 4096  # most prompt tokens per forward pass, all rows together: it bounds the memory for masks and activations

Listen = Callable[[Tensor, Tensor, Tensor], None]  # `DraftRun.read`


class CausalLM:
    """A supported model, and what is known of it.

    Args:
        model: the model; it is left as it is found.
        cache: the kind of cache that its runs own.

    Raises:
        UnsupportedModel: trees cannot be scored with it.
    """

    reads: Any = None  # identifies the tokens it reads, if they are not those of its own tokenizer

    def __init__(self, model: PreTrainedModel, cache: type[TreeCache] = TreeCache):
        check_ready(model)
        self.model, self.route, self.cache = model, Route(model, NAME), cache
        self.device, self._home = device_of(model), _home(model)
        # By the dtype of autocast, as keys and values have that dtype.
        self._layouts = {autocast_dtype(self.device): layout_of(model)}
        self.layers = len(next(iter(self._layouts.values())))
        self.vocab: int = model.config.get_text_config().vocab_size
        self.context_length, self.context_reason = context_limit_of(model)
        self.cache_argument, self.keeps_logits = cache_argument(model), takes(model, "logits_to_keep")

    def start(
        self, rows: int, capacity: int, states: Sequence[int] = (), last: CachedModel | None = None
    ) -> CachedModel:
        """A run with room for `capacity` slots per row.

        Args:
            rows: size of the batch.
            capacity: slots per row.
            states: which states are noted in every pass: see `Drafter.states`.
            last: an earlier run. It is returned if it has the same sizes; else the new run may take over its cache.
        """
        check_ready(self.model)
        if _home(self.model) != self._home:
            raise ValueError(f"{type(self.model).__name__} has been moved or cast since it was wrapped; wrap it anew.")
        if last is not None and last.lm.kind != self.kind:
            last = None
        made = (rows, capacity, tuple(states), autocast_dtype(self.device))
        return last if last is not None and last.made == made else CachedModel(self, *made, last)

    @property
    def kind(self) -> tuple[object, ...]:
        """All that a cache's contents depend on, but for the text: runs of one kind can take over from each other."""
        return self.model, self.cache, self.reads

    def layout(self, autocast: torch.dtype | None) -> Any:
        """The shapes of the model's key-value layers under this autocast."""
        if autocast not in self._layouts:
            self._layouts[autocast] = score_probe_tree(self.model, self.layers)[1]
        return self._layouts[autocast]

    def translate(self, tokens: Tensor) -> Tensor:
        """The model's own ids for the text's tokens, as the other model of a pair may have a longer vocabulary."""
        return tokens.clamp(max=self.vocab - 1)

    def translate_back(self, logits: Tensor) -> Tensor:
        """Logits over the text's tokens, from logits over the model's own."""
        return logits


class CachedModel:
    """A run of a model: its cache, and the passes that read and write it.

    Args:
        lm: the model.
        rows, capacity, states: as for `CausalLM.start`.
        autocast: the dtype of autocast; None outside of it.
        last: a run to take over from.
    """

    def __init__(
        self,
        lm: CausalLM,
        rows: int,
        capacity: int,
        states: tuple[int, ...],
        autocast: torch.dtype | None,
        last: CachedModel | None,
    ):
        self.lm, self.made = lm, (rows, capacity, states, autocast)
        self._autocast, self._last = autocast, last
        self.cache = lm.cache(lm.layout(autocast), rows, capacity, lm.device)
        self.capture = Capture(lm.model, states, lm.device)
        self.compiles = False  # whether passes are compiled: those of steps, whose shapes recur
        self._texts: list[np.ndarray] = []  # the texts that the cache holds the beginnings of
        # The fingerprint of the model that wrote the cache; None if no later turn will ask.
        self._computed: Any = None

    @cached_property
    def _compiled(self) -> Compiled:
        return Compiled(self._logits, self.lm.model)

    @property
    def states(self) -> Tensor | None:
        """[batch, count, state, hidden] of the last pass, if some were asked for."""
        return self.capture.states

    def enter(self, batch: Batch, rows: Sequence[int], draft: DraftRun | None = None) -> None:
        """Read the prompts of these rows but for their last tokens; of a run to be resumed, what is not in the cache.

        Args:
            draft: is told the states, if some were asked for: of each row the last at least.
        """
        last, noted = self._last or self, batch.keep or batch.resume
        computes = (self._autocast, fingerprint(self.lm.model, numbers=True)) if noted else None
        goals = most = [n - 1 for n in batch.host_lengths]
        listen = draft.read if draft is not None and self.capture.which else None
        if draft is not None and listen:
            most = [min(goal - 1, known) for goal, known in zip(goals, draft.states_known(), strict=True)]
        kept = [0] * len(goals)
        if batch.resume and len(last._texts) == len(goals) and last._computed == computes:
            alike = map(_alike, last._texts, batch.texts)
            kept = [max(min(row), 0) for row in zip(most, alike, last.cache.lengths.tolist(), strict=True)]
        for row in {*range(len(goals))} - {*rows}:  # these go on as they are
            goals[row] = kept[row] = int(self.cache.lengths[row])
        self._texts, last._texts, self._last = [], [], None  # if this fails half-way, neither cache is used again
        self.cache.take_over(last.cache, kept)
        self._texts, self._computed, self.compiles = batch.records, computes, False
        self.read(batch.tokens, goals, listen)
        self.compiles = batch.stages.compiles

    def read(self, tokens: Tensor, goals: list[int], listen: Listen | None = None) -> None:
        """Read and commit the tokens of each row b up to goals[b]. tokens: [batch, capacity] int64."""
        goal, now = torch.tensor(goals, device=self.lm.device), self.cache.lengths
        while missing := int((goal - now).max()):
            count = min(max(_TOKENS // len(tokens), 1), missing)
            # Shorter rows re-read their last tokens, so that all rows read `count`.
            start = now.minimum((goal - count).clamp(min=0))
            self.cache.rewind(start)
            topology = chain(len(tokens), count, self.lm.device)
            self.forward(self.pending(tokens, count), topology, int(start.max()), logits_to_keep=1)
            end = (start + count).minimum(goal)
            if listen is not None and self.states is not None:
                listen(self.states, start, end - start)
            self.cache.rewind(end)
            now = self.cache.lengths

    def pending(self, tokens: Tensor, count: int) -> Tensor:
        """[batch, count] int64: the tokens of each row after its committed ones (clamped at the end of the buffer)."""
        index = self.cache.lengths[:, None] + torch.arange(count, device=self.lm.device)
        return tokens.gather(1, index.clamp_(max=tokens.shape[1] - 1))

    def forward(self, tokens: Tensor, topology: Topology, longest: int, logits_to_keep: int | None = None) -> Tensor:
        """Score the last nodes of a tree whose earlier nodes were scored before.

        Args:
            tokens: [batch, count] int64, the tokens of the last `count` nodes of the topology.
            topology: the tree so far; node i is in the i-th slot after the committed ones.
            longest: a host bound on the committed slots of any row.
            logits_to_keep: how many of the last nodes get logits; all by default.

        Returns:
            [batch, count, vocab] logits.
        """
        count, nodes = tokens.shape[1], topology.parents.shape[1]
        view = View(self.cache.lengths, topology, count, min(longest + nodes, self.cache.capacity))
        self.cache.open(view)
        positions = view.positions
        if self.lm.context_length is not None:
            # Nodes beyond their row's budget are never used, but their positions must be valid.
            positions = positions.clamp(max=self.lm.context_length - 1)
        tokens, keep = self.lm.translate(tokens), logits_to_keep or count
        with self.lm.route, self.capture.of_pass(keep):
            if self.compiles:
                view.prepare()
                logits = self._compiled((*tokens.shape, view.slots), tokens, positions, self.cache, keep)
            else:
                logits = self._logits(tokens, positions, self.cache, keep)
        return self.lm.translate_back(logits)

    def _logits(self, tokens: Tensor, positions: Tensor, cache: TreeCache, keep: int) -> Tensor:
        lm = self.lm
        # To note the LM head's input at all nodes, the head is handed all of them; it still computes only `keep`.
        handed = tokens.shape[1] if -1 in self.capture.which else keep
        named: dict[str, Any] = {lm.cache_argument: cache, **({"logits_to_keep": handed} if lm.keeps_logits else {})}
        return lm.model(input_ids=tokens, position_ids=positions, use_cache=True, **named).logits[:, -keep:]


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens the beginnings of two texts have in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _home(model: PreTrainedModel) -> tuple[torch.dtype, torch.device]:
    weight = embedding(model)
    return weight.dtype, weight.device
