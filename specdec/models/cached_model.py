"""A run of a Hugging Face causal LM over rows of different lengths: it reads texts and scores tree nodes.

Targets and draft models both run in it. It owns its cache; what is known of the model is in a `CausalLM`, which may be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.models.attention import View
from specdec.models.cache import TreeCache
from specdec.models.compilation import Compiled
from specdec.models.fingerprint import fingerprint
from specdec.models.held_texts import Entry, HeldTexts, next_readings
from specdec.models.products import few_rows
from specdec.models.served_functions import one_pass
from specdec.models.states import Capture
from specdec.tree import Topology, chain
from specdec_kernels.tree_attention import MAX_NODES

if TYPE_CHECKING:
    from specdec.drafters.base import DraftRun
    from specdec.models.causal_lm import CausalLM

_TOKENS = 4096  # most prompt tokens per forward pass, all rows together: it bounds the memory for masks and activations

Listen = Callable[[Tensor, Tensor, Tensor], None]  # `DraftRun.read`


class CachedModel:
    """A run of a model: its cache, and the passes that read and write it.

    Args:
        lm: the model.
        rows, capacity, nodes, states: as for `CausalLM.start`.
        autocast: the dtype of autocast; None outside of it.
        marks: as for `CausalLM.start`.
        last: a run to take over from.
    """

    def __init__(
        self,
        lm: CausalLM,
        rows: int,
        capacity: int,
        nodes: int,
        states: tuple[int, ...],
        autocast: torch.dtype | None,
        marks: bool,
        last: CachedModel | None,
    ):
        self.lm, self.made = lm, (rows, capacity, nodes, states, autocast)
        self._autocast, self._nodes = autocast, nodes
        self.cache = lm.cache(lm.layout(autocast), rows, capacity, lm.device, nodes, marks)
        self.capture = Capture(lm.model, states, lm.device)
        self.compiles = False  # whether passes over nodes are compiled: their shapes recur
        self._few_rows = few_rows(lm.device)
        self._held = HeldTexts(self.cache)
        # The fingerprint of the model that wrote the cache; None if no later run will ask.
        self.computed: Any = None
        self.begin(last)

    def begin(self, last: CachedModel | None) -> None:
        """Begin a run, which may go on from `last`: a run that has ended, perhaps this one."""
        self._last, self._begins = last, True
        self.tokens_read = self.tokens_copied = 0  # in prompts

    @cached_property
    def _compiled(self) -> Compiled:
        return Compiled(
            CachedModel._logits, self.lm.model
        )  # not of this run: in a circle it would outlive its last user

    @property
    def states(self) -> Tensor | None:
        """[batch, count, state, hidden] of the last pass, if some were asked for."""
        return self.capture.states

    def enter(self, batch: Batch, rows: Sequence[int], draft: DraftRun | None = None) -> None:
        """Read the texts of these rows but for their last tokens, while the other rows go on.

        Beginnings that some row has read already are copied from there: what samples of one prompt share, a system prompt, or
        an earlier turn. Recurrent states are marked where rows part, else at the end of a prompt.

        Args:
            draft: is told the states, if some were asked for: of each row the last at least.
        """
        earlier = self._earlier(batch)
        listen = draft.read if draft is not None and self.capture.which else None
        known = draft.states_known([*rows]) if draft is not None and listen else batch.host_lengths
        # a state can only be told where its token is read
        entries = {row: self._entry(batch, row, known[row], told=bool(listen)) for row in rows}
        goals, before = sum(entry.goal for entry in entries.values()), self.tokens_read
        while entries:
            self._enter_some(batch, entries, earlier, listen)
        self.tokens_copied += goals - (self.tokens_read - before)
        self.compiles = batch.compiles

    def _entry(self, batch: Batch, row: int, known: int, told: bool) -> Entry:
        goal = batch.host_lengths[row] - 1
        if self.cache.recurrent:
            self.cache.prompts[row] = batch.prompts[row]
        mark = batch.prompts[row] - 1 - told if self.cache.marked else 0
        return Entry(batch.text(row), goal, min(goal - told, known), mark)

    def _enter_some(
        self, batch: Batch, entries: dict[int, Entry], earlier: CachedModel | None, listen: Listen | None
    ) -> None:
        """Read what can be read next of these texts, and take those from `entries` that have been read to their ends."""
        sources, stops = next_readings(self.cache, entries, [*self._held, *(earlier._held if earlier else ())])
        self._held.forget(sources)  # if this fails half-way, nobody goes on from it
        self.cache.take(sources)
        self.read(batch.tokens, stops, listen)
        for row, stop in stops.items():
            self._held.note(row, batch.records[row])
            entry = entries[row]
            if self.cache.marked and stop and (stop < entry.goal or stop == entry.mark):
                self.cache.mark(row, stop, anew=batch.resume)
            entry.most = max(entry.most, stop)
            if stop == entry.goal:
                del entries[row]

    def _earlier(self, batch: Batch) -> CachedModel | None:
        """When a run begins: another one that it may go on from. Forgets what has been read if it may not."""
        if not self._begins:
            return None
        last, self._last, self._begins = self._last, None, False
        computes = (self._autocast, fingerprint(self.lm.model, numbers=True)) if batch.keep or batch.resume else None
        goes_on = batch.resume and last is not None and last.computed == computes and not last.cache.torn
        self.computed = computes
        if not (goes_on and last is self):
            self._held.forget(range(len(batch)))
            self.cache.torn = False  # every row begins anew
        return last if goes_on and last is not self else None

    def read(self, tokens: Tensor, goals: Mapping[int, int], listen: Listen | None = None) -> None:
        """Read and commit the tokens of each row b of `goals` up to goals[b]. tokens: [batch, capacity] int64."""
        rows, goal = [*goals], torch.tensor([*goals.values()], device=self.lm.device)
        # `listen` is told of all rows, so that the states of all take memory.
        most = max(_TOKENS // len(tokens if listen else rows), 1)
        with self.cache.only(rows):
            part = tokens if self.cache.rows is None else tokens[self.cache.rows]
            now = self.cache.committed.clone()
            while missing := int((goal - now).max()):
                count = min(most, missing)
                # Tokens beyond a row's goal are of no account.
                fresh = (goal - now).clamp(max=count)
                topology = chain(len(rows), count, self.lm.device)
                self.forward(self.pending(part, count), topology, int(now.max()), logits_to_keep=1, entering=fresh)
                if listen is not None and self.states is not None:
                    listen(*(self._of_batch(part) for part in (self.states, now, fresh)))
                self.tokens_read += int(fresh.sum())
                now = now + fresh
                self.cache.rewind(now)

    def read_anew(self, tokens: Tensor, goals: Mapping[int, int]) -> None:
        """Outside of runs: read so many tokens of these rows, whatever was read before. What rows share is copied."""
        texts = tokens.cpu().numpy()
        entries = {row: Entry(texts[row, :goal], goal, goal, 0) for row, goal in goals.items()}
        held = HeldTexts(self.cache)
        while entries:
            sources, stops = next_readings(self.cache, entries, held)
            self.cache.take(sources)
            self.read(tokens, stops)
            for row, stop in stops.items():
                held.note(row, entries[row].text)
                if stop == entries[row].goal:
                    del entries[row]

    def _of_batch(self, part: Tensor) -> Tensor:
        """[batch, ...]: what rows [rows, ...] were given, and 0 in all others."""
        if self.cache.rows is None:
            return part
        return part.new_zeros((len(self.cache.lengths), *part.shape[1:])).index_copy_(0, self.cache.rows, part)

    def pending(self, tokens: Tensor, count: int) -> Tensor:
        """[rows, count] int64: the tokens of each row after its committed ones (clamped at the end of the buffer)."""
        index = self.cache.committed[:, None] + torch.arange(count, device=self.lm.device)
        return tokens.gather(1, index.clamp_(max=tokens.shape[1] - 1))

    def forward(
        self,
        tokens: Tensor,
        topology: Topology,
        longest: int,
        logits_to_keep: int | None = None,
        entering: Tensor | None = None,
    ) -> Tensor:
        """Score the last nodes of a tree whose earlier nodes were scored before.

        Args:
            tokens: [rows, count] int64, the tokens of the last `count` nodes of the topology.
            topology: the tree so far; node i is in the i-th slot after the committed ones.
            longest: a host bound on the committed slots of any row.
            logits_to_keep: how many of the last nodes get logits; all by default.
            entering: see `TreeCache.open`.

        Returns:
            [batch, count, vocab] logits.
        """
        count, nodes = tokens.shape[1], topology.parents.shape[1]
        compiles = self.compiles and entering is None and self._compiled.works
        # Compiled code is for texts of any length: it has no bound but the cache's.
        slots = self.cache.capacity if compiles else min(longest + nodes, self.cache.capacity)
        view = View(self.cache.committed, topology, count, slots)
        self.cache.open(view, entering)
        positions = view.positions
        if self.lm.context_length is not None:
            # Nodes beyond their row's budget are never used, but their positions must be valid.
            positions = positions.clamp(max=self.lm.context_length - 1)
        tokens, keep = self.lm.translate(tokens), logits_to_keep or count
        with self.lm.route, self.capture.of_pass(keep), one_pass():
            if compiles:
                # Levels of a tree share code. Recurrent layers keep its nodes in place, so for them each has its own.
                seen = nodes if self.cache.recurrent else max(nodes, min(self._nodes, MAX_NODES))
                view.prepare(seen, [layer.shape.size for layer in self.cache.recurrent])
                logits = self._compiled((*tokens.shape, slots, seen), self, tokens, positions, self.cache, keep)
            else:
                with self._few_rows:
                    logits = self._logits(tokens, positions, self.cache, keep)
        return self.lm.translate_back(logits)

    def _logits(self, tokens: Tensor, positions: Tensor, cache: TreeCache, keep: int) -> Tensor:
        lm = self.lm
        # To note the LM head's input at all nodes, the head is handed all of them; it still computes only `keep`.
        handed = tokens.shape[1] if -1 in self.capture.which else keep
        named: dict[str, Any] = {lm.cache_argument: cache, **({"logits_to_keep": handed} if lm.keeps_logits else {})}
        if lm.takes_positions:
            named["position_ids"] = positions
        return lm.model(input_ids=tokens, use_cache=True, **named).logits[:, -keep:]
