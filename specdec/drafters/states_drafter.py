"""The base of drafters with a `StatesNet`, which reads the target's states into a cache of its own as the text grows."""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.batch import Batch
from specdec.checks import check_kind
from specdec.drafters.base import DraftRun
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.drafters.tree_drafter import TreeDrafter, TreeDraftRun
from specdec.models.attention import View
from specdec.models.cache import Source, TreeCache
from specdec.models.fingerprint import fingerprint
from specdec.models.held_texts import HeldTexts, longest_beginning
from specdec.models.layer_shapes import LayerShape, Slab
from specdec.models.level import CachedLevel
from specdec.models.products import few_rows
from specdec.models.ready import autocast_dtype
from specdec.models.target import ModelTargetRun, TargetRun
from specdec.tree import Topology, chain
from specdec.trees.base import Frontier, TreePolicy


class StatesDrafter(TreeDrafter):
    """Drafts with a network that reads the target's states.

    Args:
        net: the network, in eval mode. It is not moved: a target on another device is drafted for by a copy.
        tree: the tree policy; a chain of 4 by default.
    """

    kind: ClassVar[type[StatesNet]] = StatesNet  # of its network
    capturable_scores = True

    def __init__(self, net: StatesNet, tree: TreePolicy | None = None):
        check_kind("net", net, self.kind, f"pass the {self.kind.__name__} of a {type(self).__name__}")
        super().__init__(tree)
        self.net, self.states, self.models = net, tuple(net.states), (net,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.net).__name__}, {self.tree})"

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        if not isinstance(target, ModelTargetRun):
            raise ValueError(
                f"{self} reads states of transformers models; the target is a {type(target.target).__name__}."
            )
        self._check(target.cached.lm.model, batch.vocab)
        known = last if isinstance(last, StatesRun) else None
        run = self._run(self._net_on(batch.device, known), target, batch, known).begun(last)
        assert isinstance(run, StatesRun)
        return run.resumed(known)

    @abstractmethod
    def _run(self, net: Any, target: ModelTargetRun, batch: Batch, last: StatesRun | None) -> StatesRun:
        """A run, perhaps in the cache of `last`."""

    def _net_on(self, device: torch.device, last: StatesRun | None) -> StatesNet:
        """The network on this device; a copy has the weights that the network has now."""
        if _place(self.net) == device:
            return self.net
        net = last.net if last is not None and _place(last.net) == device else deepcopy(self.net).to(device)
        net.load_state_dict(self.net.state_dict())
        return net

    def _check(self, model: PreTrainedModel, vocab: int) -> None:
        """Raise ValueError unless the network is one for this target."""
        net, size = self.net, model.config.get_text_config().hidden_size
        if net.state_size != size:
            raise ValueError(
                f"{self} reads states of size {net.state_size}, the target's have {size}; use another draft."
            )
        known, ids, own = net.vocab, net.target_ids, getattr(net, "embed_tokens", None)
        if own is not None and own.num_embeddings < vocab:
            raise ValueError(f"{self} embeds {own.num_embeddings} tokens, the target knows {vocab}; use another draft.")
        if ids is not None and (len(ids) != known or len(ids.unique()) != known):
            raise ValueError(f"{self} knows {known} tokens, but not each by an id of its own; use another draft.")
        if ids is None and known not in (None, vocab):
            raise ValueError(f"{self} knows {known} tokens, the target knows {vocab}; use another draft.")
        if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(
                f"{self} drafts tokens {int(ids.min())} to {int(ids.max())}, the target knows {vocab}; use another draft."
            )


class StatesRun(TreeDraftRun):
    """A network at work. Its cache holds the text and, behind that, what it computes of a tree."""

    drafter: StatesDrafter
    parts: TargetParts  # looked up when a run begins, as they may have been replaced

    def __init__(
        self, drafter: StatesDrafter, net: StatesNet, target: ModelTargetRun, batch: Batch, last: StatesRun | None
    ):
        self.cache = _cache(net, batch, last)
        super().__init__(drafter, batch, last, net, self.cache, target)
        self.net, self._target = net, target
        self._few_rows = few_rows(batch.device)
        self._held = HeldTexts(self.cache, net.ahead)
        self._earlier: StatesRun | None = None
        self._computed: Any = None  # by which weights the cache was written; None if no later run will ask
        # [batch, kept]: of the last position that was read, or zeros; captured graphs write to it in place
        self.last = torch.zeros(len(batch), net.kept, dtype=_dtype(net, batch.device), device=batch.device)

    @property
    def bytes(self) -> int:
        return self.cache.bytes

    def resumed(self, last: StatesRun | None) -> StatesRun:
        """This run at its first step, which may go on from `last`: a run that has ended, perhaps this one."""
        self._earlier, self._begins = last, True
        self.parts = TargetParts.of(self._target.cached.lm.model, self.net)
        return self

    def states_known(self, rows: list[int]) -> dict[int, int]:
        earlier = self._earlier_texts()
        if not self.net.attention:
            # the last is passed in any case, and it is enough
            return {row: self.batch.host_lengths[row] for row in rows}
        held = [*earlier, *self._held]
        sources = {}
        for row in rows:
            text = self.batch.text(row)
            sources[row] = longest_beginning(held, Source(self.cache, row, 0), text, len(text) - 2)
        self.cache.take(sources)
        self._held.forget(rows)  # if this fails half-way, nobody goes on from it
        return {row: source.count for row, source in sources.items()}

    def _earlier_texts(self) -> HeldTexts | tuple[()]:
        """When a run begins: what another one holds. Forgets what this one does, if that cannot be used."""
        if not self._begins:
            return ()
        last, self._earlier, self._begins = self._earlier, None, False
        batch, target = self.batch, self._target.cached.computed
        computes = (target, fingerprint(self.net, numbers=True)) if target is not None else None
        goes_on = batch.resume and last is not None and computes is not None and last._computed == computes
        self._computed = computes
        if not (goes_on and last is self):
            self._held.forget(range(len(batch)))
        return last._held if goes_on and last is not None and last is not self else ()

    def enter(self, rows: list[int]) -> None:
        for row in rows:
            self._held.note(row, self.batch.records[row])
            if self.batch.host_lengths[row] == 1:  # nothing was read
                self.last[row] = 0

    def read(self, states: Tensor, start: Tensor, count: Tensor) -> None:
        n, rows = states.shape[1], range(len(self.batch))
        if n > self._nodes:  # behind the texts of other rows there is room for a tree, but not for a prompt
            rows = count.nonzero()[:, 0].tolist()
        with self.cache.only(rows), self._few_rows:
            part = self.cache.rows
            tensors = (self.batch.tokens, states, start, count, self.last)
            tokens, states, start, count, last = tensors if part is None else (t[part] for t in tensors)
            last = torch.where(count[:, None] > 0, self._follow(tokens, states, start, count), last)
            self.last[slice(None) if part is None else part] = last

    def _follow(self, tokens: Tensor, states: Tensor, start: Tensor, count: Tensor) -> Tensor:
        """[rows, kept]: read the target's states at these positions; what is kept of each row's last."""
        (rows, n), ahead, here = states.shape[:2], self.net.ahead, self.cache.committed.clone()
        some = count > 0
        start = torch.where(some, start, here + ahead)  # rows without any read garbage, where it harms nothing
        self.cache.rewind(start)
        index = start[:, None] + ahead + torch.arange(n, device=start.device)
        # What was drawn from logits that are no law may be no token; the host learns of the fault after the step.
        tokens = tokens.gather(1, index.clamp(max=tokens.shape[1] - 1)).clamp(max=self.batch.vocab - 1)
        topology = self.batch.chain(n) if rows == len(self.batch) else chain(rows, n, start.device)
        kept = self.net.follow(tokens, states.to(self.last.dtype), self.level(topology, n), self.parts)
        self.cache.rewind(torch.where(some, start + count - ahead, here))
        return kept.gather(1, (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, kept.shape[2]))[:, 0]

    def level(self, topology: Topology, count: int) -> CachedLevel:
        """The last `count` nodes of a topology, whose first is behind the committed slots."""
        nodes = topology.parents.shape[1]
        view = View(self.cache.committed, topology, count, min(self.batch.longest + nodes, self.cache.capacity))
        self.cache.open(view)
        return CachedLevel(self.cache, view)

    def _scored(self, frontier: Frontier) -> Tensor:
        with self._few_rows:
            return super()._scored(frontier)


def _cache(net: StatesNet, batch: Batch, last: StatesRun | None) -> TreeCache:
    """A cache for the network's layers: that of `last` if it is one for the same texts."""
    if last is not None and last.batch is batch and last.net is net and last.last.dtype == _dtype(net, batch.device):
        return last.cache
    place = _dtype(net, batch.device), batch.device
    layers = zip(net.attention, net.values or net.attention, strict=True)
    shapes = [LayerShape((Slab(*keys, *place), Slab(*values, *place))) for keys, values in layers]
    return TreeCache(shapes, len(batch), batch.capacity + net.slots, batch.device)


def _place(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _dtype(net: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype that the network computes in."""
    return autocast_dtype(device) or next(net.parameters()).dtype
