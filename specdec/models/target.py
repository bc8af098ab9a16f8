"""Targets: what scores trees. `ModelTarget` does it for any unmodified Hugging Face causal LM that is supported.

A draft model runs in the same machinery: `CachedModel` reads ragged text and scores tree nodes, with per-row lengths.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from operator import eq
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.base import Acceptance, Context
from specdec.models.attention import NAME, View
from specdec.models.cache import TreeCache, cache_argument
from specdec.models.compilation import Compiled
from specdec.models.context_limit import context_limit_of
from specdec.models.fingerprint import fingerprint
from specdec.models.prepared_inputs import preparer_name, takes
from specdec.models.probe import (
    autocast_dtype,
    check_ready,
    check_text,
    device_of,
    embedding,
    layout_of,
    score_probe_tree,
)
from specdec.models.routing import Route
from specdec.tree import DraftTree, Topology, chain, text_chain

_TOKENS = 4096  # prompt tokens read per forward pass, all rows together: bounds masks and activations of long prompts


class Scores(NamedTuple):
    """What the target says of a tree."""

    logits: Tensor  # [batch, node, vocab]
    hidden: Tensor | None  # [batch, node, hidden]: `Target.hidden` then


class Target(ABC):
    """What the loop asks of a target. Subclass it to decode from something that is not a transformers model."""

    vocab: int  # size of the vocabulary: the last axis of `score`
    context_length: int | None = None  # longest text it can read, in tokens; None if unbounded
    context_reason: str = ""  # said after that number where a longer text is refused, as in " (beyond it ...)"
    device: torch.device = torch.device("cpu")
    stop_tokens: int | Sequence[int] | None = None  # what ends a text unless generate(stop_tokens=...) says otherwise
    model: PreTrainedModel | None = None
    run: object = None  # which run it scores for; set by the loop
    kept: bool = True  # whether other runs may come after the one that it is made for
    hidden: Tensor | None = None  # [batch, node, hidden] of the nodes scored last, if `start` was told to keep it
    capturable: bool = (
        False  # True if `score` and `commit` do the same to the device every step: see `specdec.engines.graphs`
    )

    @abstractmethod
    def start(self, context: Context, capacity: int, hidden: bool) -> None:
        """Read the prompts up to, but not including, the root.

        Args:
            context: the batch; it stays the same object for the whole run.
            capacity: slots per row: the longest text and the largest tree together.
            hidden: whether to keep `context.hidden` up to date.
        """

    @abstractmethod
    def score(self, tree: DraftTree, context: Context) -> Tensor:
        """[batch, node, vocab]: logits after the path to each node."""

    @abstractmethod
    def commit(self, acceptance: Acceptance) -> None:
        """Keep the accepted nodes; called after every `score`."""

    def check_text(self, text: list[int]) -> None:  # noqa: B027 - optional
        """Raise ValueError if it reads something else in place of this text; asked again when a text has ended."""

    def patched(self) -> AbstractContextManager[None]:
        """Entered around drafting and scoring, and again around following."""
        return nullcontext()


class CachedModel:
    """A Hugging Face causal LM over a batch of rows with lengths of their own."""

    def __init__(self, model: PreTrainedModel):
        check_ready(model)
        self.model, self.layout, self.patch = model, layout_of(model), Route(model, NAME)
        self._cache_argument, self._keeps = cache_argument(model), takes(model, "logits_to_keep")
        self.vocab: int = model.config.get_text_config().vocab_size
        self.context_length, self.context_reason = context_limit_of(model)
        self.device, self._home = device_of(model), _home(model)
        self._autocast = autocast_dtype(self.device)
        self.cache = TreeCache(self.layout, 0, 0, self.device)
        self.compiled: Compiled | None = None
        self._compiled: Compiled | None = None  # compiled pass for this cache; unused in prefill
        self.hidden: Tensor | None = None  # [batch, node, hidden] of the last forward pass, inside `capturing_hidden`
        self._texts: list[list[int]] = []  # of the run that the cache is of; [] if of none

    def begin(self, context: Context, capacity: int, unread: int = 1, last: bool = False) -> None:
        """Begin a run by reading the prompts but for their last tokens; what a run to be resumed has read, is not again.

        Args:
            context: of the run.
            capacity: slots per row.
            unread: how many tokens of each prompt to leave.
            last: whether nobody will resume this run.
        """
        goals = [max(n - unread, 0) for n in context.host_lengths]
        computes = None if last else (autocast_dtype(self.device), fingerprint(self.model, numbers=True))
        kept = [0] * len(goals)
        if context.resume and len(self._texts) == len(goals) and self._computed == computes:
            alike = (sum(takewhile(bool, map(eq, *pair))) for pair in zip(self._texts, context.texts, strict=True))
            kept = list(map(min, goals, alike, self.cache.lengths.tolist()))
        self.start(len(goals), capacity, kept)
        self._texts, self._computed = context.texts, computes
        self.read(context.tokens, goals)

    def start(self, batch: int, capacity: int, kept: list[int] | None = None) -> None:
        """Begin with the first kept[b] slots of each row, by default none; in the cache of the last run if of that size."""
        kept, last, self._texts = kept or [0] * batch, self.cache, []
        check_ready(self.model)
        if _home(self.model) != self._home:
            raise ValueError(f"{type(self.model).__name__} has been moved or cast since it was wrapped; wrap it anew.")
        if (autocast := autocast_dtype(self.device)) != self._autocast:  # keys and values have another dtype now
            self._autocast, self.layout = autocast, score_probe_tree(self.model, len(self.layout))[1]
            self.cache = last = TreeCache(self.layout, 0, 0, self.device)
        if (len(last.lengths), last.capacity) != (batch, capacity):
            self.cache, self._compiled = TreeCache(self.layout, batch, capacity, self.device), None
        self.cache.take_over(last, kept)
        self.compiled = self.hidden = None
        self.longest = max(kept)  # host bound on cache.lengths

    def forward(self, tokens: Tensor, topology: Topology, logits_to_keep: int | None = None) -> Tensor:
        """Score the last nodes of a tree whose earlier nodes were scored before.

        Args:
            tokens: [batch, count] int64, the tokens of the last `count` nodes of the topology.
            topology: the tree so far; node i lies i slots after the committed ones.
            logits_to_keep: how many of the last nodes get logits; all by default.

        Returns:
            [batch, count, vocab] logits.
        """
        count, nodes = tokens.shape[1], topology.parents.shape[1]
        view = View(self.cache.lengths, topology, count, min(self.longest + nodes, self.cache.capacity))
        self.cache.open(view)
        positions = view.positions
        if self.context_length is not None:  # nodes past the budget of their row are never used: keep them in range
            positions = positions.clamp(max=self.context_length - 1)
        tokens = tokens.clamp(max=self.vocab - 1)  # the other model of a pair may have a longer vocabulary
        if self.compiled is None:
            return self._logits(tokens, positions, self.cache, logits_to_keep or count)
        view.prepare()
        return self.compiled((*tokens.shape, view.slots), tokens, positions, self.cache, count)

    def _logits(self, tokens: Tensor, positions: Tensor, cache: TreeCache, keep: int) -> Tensor:
        named: dict[str, Any] = {self._cache_argument: cache, **({"logits_to_keep": keep} if self._keeps else {})}
        return self.model(input_ids=tokens, position_ids=positions, use_cache=True, **named).logits[:, -keep:]

    def compile(self) -> None:
        """Compile the forward passes that follow: those of steps, whose shapes recur."""
        self.compiled = self._compiled = self._compiled or Compiled(self._logits, self.model)

    def read(self, tokens: Tensor, lengths: list[int]) -> None:
        """Commit the tokens of each row from where it stands up to lengths[b]. tokens: [batch, capacity] int64."""
        goal = torch.tensor(lengths, device=self.device)
        now = self.cache.lengths
        while missing := int((goal - now).max()):
            count = min(max(_TOKENS // len(tokens), 1), missing)
            now.copy_(
                now.minimum((goal - count).clamp(min=0))
            )  # shorter rows re-read their last tokens, so that all read `count`
            self.forward(self.pending(tokens, count), text_chain(len(tokens), count, self.device), logits_to_keep=1)
            now.copy_((now + count).minimum(goal))
            self.longest = max(self.longest, int(now.max()))

    def pending(self, tokens: Tensor, count: int) -> Tensor:
        """[batch, count] int64: the tokens of each row after its committed ones (clamped at the end of the buffer)."""
        index = self.cache.lengths[:, None] + torch.arange(count, device=self.device)
        return tokens.gather(1, index.clamp_(max=tokens.shape[1] - 1))

    @contextlib.contextmanager
    def capturing_hidden(self) -> Iterator[None]:
        """Forward passes inside leave in `hidden`, on `device`, what the LM head reads: the last states, normed."""

        def catch(module, args):
            if self.patch.here:  # other threads may run the model
                self.hidden = args[0].to(self.device)  # of a model over several devices the last layer is on another

        # not of the base model: OPT's own forward pass goes around it, and Llama 4 names none
        head: Any = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(catch)
        try:
            yield
        finally:
            handle.remove()


def _home(model: PreTrainedModel) -> tuple[torch.dtype, torch.device]:
    weight = embedding(model)
    return weight.dtype, weight.device


class ModelTarget(Target):
    """A Hugging Face causal LM as target."""

    capturable = True

    def __init__(self, model: PreTrainedModel):
        self.cached = CachedModel(model)
        self.model, self.vocab, self.device = model, self.cached.vocab, self.cached.device
        self.context_length, self.context_reason = self.cached.context_length, self.cached.context_reason
        self.stop_tokens = None if model.generation_config is None else model.generation_config.eos_token_id
        self._capture = nullcontext

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        with self.cached.patch, self._capture():
            yield

    def check_text(self, text: list[int]) -> None:
        if not preparer_name(self.cached.model).startswith("transformers."):
            check_text(self.cached.model, text[:-1])  # nobody has read the last token

    def start(self, context: Context, capacity: int, hidden: bool) -> None:
        for text in context.texts:
            check_text(self.cached.model, text)
        self._capture = self.cached.capturing_hidden if hidden else nullcontext
        self._context = context
        with self._capture():
            self.cached.begin(context, capacity, unread=1 + hidden, last=not self.kept)
            if hidden:  # the token before the root by itself, for the state it leaves
                self.cached.forward(self.cached.pending(context.tokens, 1), chain(len(context.tokens), 1, self.device))
                assert self.cached.hidden is not None
                if context.hidden is None:
                    context.hidden = torch.empty_like(self.cached.hidden[:, 0])
                context.hidden.copy_(self.cached.hidden[:, 0])
                self.cached.cache.lengths.copy_(context.lengths - 1)
        if context.engine.compiled:
            self.cached.compile()

    def score(self, tree: DraftTree, context: Context) -> Tensor:
        self.cached.longest = context.longest - 1
        logits = self.cached.forward(tree.tokens, tree.topology)
        # the hook may still be that of the previous run
        self.hidden = None if self._capture is nullcontext else self.cached.hidden
        return logits

    def commit(self, acceptance: Acceptance) -> None:
        self.cached.cache.keep(acceptance.path, acceptance.keep)
        if self.hidden is not None:
            last = (acceptance.keep - 1).clamp(min=0)[:, None]
            node = acceptance.path.gather(1, last)
            rows = torch.arange(len(node), device=node.device)
            assert self._context.hidden is not None
            self._context.hidden.copy_(self.hidden[rows, node[:, 0]])
