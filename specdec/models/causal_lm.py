"""A Hugging Face causal LM and what was found out about it. Its runs are `CachedModel`s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.models.attention import NAME
from specdec.models.cache import TreeCache, cache_argument
from specdec.models.cached_model import CachedModel
from specdec.models.context_limit import context_limit_of
from specdec.models.prepared_inputs import takes
from specdec.models.probe import layout_of, score_probe_tree
from specdec.models.ready import autocast_dtype, check_ready, device_of, embedding
from specdec.models.routing import Route
from specdec.models.served_functions import serve


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
        self,
        rows: int,
        capacity: int,
        nodes: int,
        states: Sequence[int] = (),
        last: CachedModel | None = None,
        marks: bool = False,
    ) -> CachedModel:
        """A run with room for `capacity` slots per row.

        Args:
            rows: size of the batch.
            capacity: slots per row.
            nodes: most nodes of a tree.
            states: which states are noted in every pass: see `Drafter.states`.
            last: an earlier run. It is returned if it has room for all that; else the new run may take over its cache.
            marks: whether recurrent states are kept where texts to come may go on from: see `TreeCache.mark`.
        """
        check_ready(self.model)
        if _home(self.model) != self._home:
            raise ValueError(f"{type(self.model).__name__} has been moved or cast since it was wrapped; wrap it anew.")
        if self._recurs:
            serve(self.model)
        if last is not None and last.lm.kind != self.kind:
            last = None
        made, marks = (rows, capacity, nodes, tuple(states), autocast_dtype(self.device)), marks and self._recurs
        if last is None or last.made != made or last.cache.marked < marks:
            return CachedModel(self, *made, marks, last)
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


def _home(model: PreTrainedModel) -> tuple[torch.dtype, torch.device]:
    weight = embedding(model)
    return weight.dtype, weight.device
