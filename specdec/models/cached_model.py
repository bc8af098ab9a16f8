"""A Hugging Face causal LM over rows of different lengths: it reads texts and scores tree nodes.

Targets and draft models both run in it. A `CausalLM` is a model and what was found out about it, and may be shared;
`CachedModel` is one run of it, and owns its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch import Batch, common_length
from specdec.models.attention import NAME, View
from specdec.models.cache import Source, TreeCache, cache_argument
from specdec.models.compilation import Compiled
from specdec.models.context_limit import context_limit_of
from specdec.models.fingerprint import fingerprint
from specdec.models.held_texts import HeldTexts, longest_beginning
from specdec.models.prepared_inputs import takes
from specdec.models.probe import autocast_dtype, check_ready, device_of, embedding, layout_of, score_probe_tree
from specdec.models.routing import Route
from specdec.models.served_functions import one_pass, serve
from specdec.models.states import Capture
from specdec.tree import Topology, chain

if TYPE_CHECKING:
    from specdec.drafters.base import DraftRun

_TOKENS = 4096  # most prompt tokens per forward pass, all rows together: it bounds the memory for masks and activations

# A row waits for another that is read before it if it can then copy so many tokens more: fewer are read as fast as copied.
_WORTH_WAITING = 32

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
        self._recurs = any(shape.recurrent for layout in self._layouts.values() for shape in layout)
        self.vocab: int = model.config.get_text_config().vocab_size
        self.context_length, self.context_reason = context_limit_of(model)
        self.cache_argument, self.keeps_logits = cache_argument(model), takes(model, "logits_to_keep")
        self.takes_positions = takes(model, "position_ids")

    def start(
        self, rows: int, capacity: int, nodes: int, states: Sequence[int] = (), last: CachedModel | None = None
    ) -> CachedModel:
        """A run with room for `capacity` slots per row.

        Args:
            rows: size of the batch.
            capacity: slots per row.
            nodes: most nodes of a tree.
            states: which states are noted in every pass: see `Drafter.states`.
            last: an earlier run. It is returned if it has the same sizes; else the new run may take over its cache.
        """
        check_ready(self.model)
        if _home(self.model) != self._home:
            raise ValueError(f"{type(self.model).__name__} has been moved or cast since it was wrapped; wrap it anew.")
        if self._recurs:
            serve(self.model)
        if last is not None and last.lm.kind != self.kind:
            last = None
        made = (rows, capacity, nodes, tuple(states), autocast_dtype(self.device))
        if last is None or last.made != made:
            return CachedModel(self, *made, last)
        last.capture.look_up(self.model)
        last.begin(last)
        return last

    @property
    def kind(self) -> tuple[object, ...]:
        """All that a cache's contents depend on, but for the text: runs of one kind can take over from each other."""
        return self.model, self.cache, self.reads

    def layout(self, autocast: torch.dtype | None) -> Any:
        """What the model's layers keep under this autocast."""
        if autocast not in self._layouts:
            self._layouts[autocast] = score_probe_tree(self.model)[1]
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
        rows, capacity, nodes, states: as for `CausalLM.start`.
        autocast: the dtype of autocast; None outside of it.
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
        last: CachedModel | None,
    ):
        self.lm, self.made = lm, (rows, capacity, nodes, states, autocast)
        self._autocast = autocast
        self.cache = lm.cache(lm.layout(autocast), rows, capacity, lm.device, nodes)
        self.capture = Capture(lm.model, states, lm.device)
        self.compiles = False  # whether passes over nodes are compiled: their shapes recur
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
        return Compiled(self._logits, self.lm.model)

    @property
    def states(self) -> Tensor | None:
        """[batch, count, state, hidden] of the last pass, if some were asked for."""
        return self.capture.states

    def enter(self, batch: Batch, rows: Sequence[int], draft: DraftRun | None = None) -> None:
        """Read the texts of these rows but for their last tokens, while the other rows go on.

        Beginnings that some row has read already are copied from there: what samples of one prompt share, a system prompt, or
        an earlier turn.

        Args:
            draft: is told the states, if some were asked for: of each row the last at least.
        """
        earlier = self._earlier(batch)
        listen = draft.read if draft is not None and self.capture.which else None
        known = draft.states_known([*rows]) if draft is not None and listen else batch.host_lengths
        goals = {row: batch.host_lengths[row] - 1 for row in rows}
        most = {row: min(goal - bool(listen), known[row]) for row, goal in goals.items()}
        for row in rows if self.cache.recurrent else ():
            self.cache.prompts[row] = batch.prompts[row]
        waiting = list(rows)
        while waiting:
            sources = self._sources(batch, waiting, most, earlier)
            self._held.forget(sources)  # if this fails half-way, nobody goes on from it
            self.cache.take(sources)
            self.read(batch.tokens, {row: goals[row] for row in sources}, listen)
            for row, source in sources.items():
                self._held.note(row, batch.records[row])
                self.tokens_copied += source.count
                waiting.remove(row)
        self.compiles = batch.stages.compiles

    def _earlier(self, batch: Batch) -> CachedModel | None:
        """When a run begins: another one that it may go on from. Forgets what has been read if it may not."""
        if not self._begins:
            return None
        last, self._last, self._begins = self._last, None, False
        computes = (self._autocast, fingerprint(self.lm.model, numbers=True)) if batch.keep or batch.resume else None
        goes_on = batch.resume and last is not None and last.computed == computes
        self.computed = computes
        if not (goes_on and last is self):
            self._held.forget(range(len(batch)))
        return last if goes_on and last is not self else None

    def _sources(
        self, batch: Batch, rows: Sequence[int], most: Mapping[int, int], earlier: CachedModel | None
    ) -> dict[int, Source]:
        """For rows that are read next, what each begins with. Rows that can soon copy much of another are left for later."""
        sources: dict[int, Source] = {}
        beginnings: dict[bytes, list[int]] = {}  # rows of `sources` by their first tokens
        held = [*self._held, *(earlier._held if earlier else ())]
        for row in rows:
            text = batch.text(row)
            best = longest_beginning(held, Source(self.cache, row, 0), text, most[row])
            same = beginnings.setdefault(text[:_WORTH_WAITING].tobytes(), [])
            ends = {other: batch.host_lengths[other] - 1 for other in same}
            shared = {other: min(common_length(batch.text(other), text), most[row]) for other in same}
            soon = max((self.cache.reaches(ends[other], shared[other]) for other in same), default=0)
            if soon < best.count + _WORTH_WAITING:
                sources[row] = best
                same.append(row)
        return sources

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
        """Begin these rows with nothing, and read their tokens; outside of runs, where no `enter` has cleared the slots."""
        self.cache.take({row: Source(self.cache, row, 0) for row in goals})
        self.read(tokens, goals)

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
        view = View(self.cache.committed, topology, count, min(longest + nodes, self.cache.capacity))
        self.cache.open(view, entering)
        positions = view.positions
        if self.lm.context_length is not None:
            # Nodes beyond their row's budget are never used, but their positions must be valid.
            positions = positions.clamp(max=self.lm.context_length - 1)
        tokens, keep = self.lm.translate(tokens), logits_to_keep or count
        with self.lm.route, self.capture.of_pass(keep), one_pass():
            if self.compiles and entering is None:
                view.prepare(layer.shape.size for layer in self.cache.recurrent)
                logits = self._compiled((*tokens.shape, view.slots), tokens, positions, self.cache, keep)
            else:
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


def _home(model: PreTrainedModel) -> tuple[torch.dtype, torch.device]:
    weight = embedding(model)
    return weight.dtype, weight.device
