"""Whether a model with recurrent state scores texts, rows and trees over our cache as it does token by token over its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.models.attention import NAME, View
from specdec.models.cache import Source, TreeCache, cache_argument
from specdec.models.layer_shapes import LayerShape
from specdec.models.prepared_inputs import takes
from specdec.models.routing import Route
from specdec.models.served_functions import one_pass
from specdec.tree import Topology, chain

_LONG, _SHORT = (1, 2, 3), (2,)  # the prompts of rows in turn; every vocabulary has these ids
_ROOT, _FIRST, _SECOND, _NEXT = 3, 1, 2, 1  # a root, its children, and what follows an accepted node
_PIECES = (2, 1)  # tokens of the prompts that are read in one pass
_NODES, _SLOTS = 3, 8

Check = tuple[str, Tensor, Tensor]  # what is checked, and [row, vocab] logits over our cache and over the model's own


def checks(model: PreTrainedModel, layout: Sequence[LayerShape], rows: Callable[..., Tensor]) -> list[Check]:
    """The logits of every check.

    Prompts of unequal lengths are read in two passes; a small tree is scored; different paths of it are committed, and another
    token is scored. All is compared with what `model.generate` computes, token by token.

    Args:
        model: the model.
        layout: what its layers keep.
        rows: gives [row, length] int64: these ids in every row.
    """
    odd = torch.arange(len(rows(1)), device=rows(1).device) % 2 > 0
    parts = [odd] if len(odd) > 1 else [odd, ~odd]  # a row alone has both prompts, one after the other
    return [check for part in parts for check in _checks(model, layout, rows, part) if len(check[1])]


def _checks(
    model: PreTrainedModel, layout: Sequence[LayerShape], rows: Callable[..., Tensor], odd: Tensor
) -> list[Check]:
    """The checks with the short prompt in the rows `odd` and the long one in the others: [row] bool."""
    even, ours = ~odd, _Ours(model, layout, rows(1))
    text = rows(*_LONG).where(even[:, None], rows(*_SHORT, *_LONG[len(_SHORT) :]))
    length = torch.where(even, len(_LONG), len(_SHORT))
    ours.cache.prompts.copy_(length)
    for start, size in zip((0, *accumulate(_PIECES)), _PIECES, strict=False):
        ours.enter(text[:, start : start + size], (length - start).clamp(0, size))
    tree = Topology(torch.tensor([[-1, 0, 0]] * len(odd), device=odd.device), depth=1, width=2)
    root, first, second = ours.score(rows(_ROOT, _FIRST, _SECOND), tree).unbind(1)
    ours.cache.keep(torch.tensor([[0, 2]] * len(odd), device=odd.device), 1 + even.long())
    after = ours.score(rows(_NEXT), chain(len(odd), 1, odd.device))[:, 0]

    def alone(prompt: Sequence[int], *ids: int) -> Tensor:
        return _token_by_token(model, rows(*prompt), rows(*ids))

    return [
        ("a text that is read in two forward passes", root[even], alone(_LONG, _ROOT)[even]),
        ("a text beside a longer one", root[odd], alone(_SHORT, _ROOT)[odd]),
        ("a tree in one forward pass", first[even], alone(_LONG, _ROOT, _FIRST)[even]),
        ("a tree in one forward pass", second[odd], alone(_SHORT, _ROOT, _SECOND)[odd]),
        ("a token after an accepted one", after[even], alone(_LONG, _ROOT, _SECOND, _NEXT)[even]),
        ("a token after a rejected one", after[odd], alone(_SHORT, _ROOT, _NEXT)[odd]),
    ]


class _Ours:
    """Forward passes over a small cache of ours."""

    def __init__(self, model: PreTrainedModel, layout: Sequence[LayerShape], like: Tensor):
        self._model, self._route = model, Route(model, NAME)
        self.cache = TreeCache(layout, len(like), _SLOTS, like.device, _NODES)
        self.cache.take({row: Source(self.cache, row, 0) for row in range(len(like))})

    def enter(self, tokens: Tensor, entering: Tensor) -> None:
        self._pass(tokens, chain(len(tokens), tokens.shape[1], tokens.device), entering)
        self.cache.rewind(self.cache.lengths + entering)

    def score(self, tokens: Tensor, topology: Topology) -> Tensor:
        return self._pass(tokens, topology, None)

    def _pass(self, tokens: Tensor, topology: Topology, entering: Tensor | None) -> Tensor:
        view = View(self.cache.lengths, topology, tokens.shape[1], _SLOTS)
        self.cache.open(view, entering)
        with self._route, one_pass():
            return over_cache(self._model, self.cache, tokens, view.positions)


def over_cache(model: PreTrainedModel, cache: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """[row, node, vocab]: the logits of a pass."""
    named: dict[str, Any] = {cache_argument(model): cache}
    if takes(model, "position_ids"):
        named["position_ids"] = positions
    return model(input_ids=tokens, use_cache=True, **named).logits


def _token_by_token(model: PreTrainedModel, prompt: Tensor, tokens: Tensor) -> Tensor:
    """[row, vocab]: the logits after tokens that are read one by one behind a prompt."""
    cache, length = DynamicCache(config=model.config), prompt.shape[1]
    positions = torch.arange(length + tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    over_cache(model, cache, prompt, positions[:, :length])
    for token, place in zip(tokens.split(1, 1), positions[:, length:].split(1, 1), strict=True):
        logits = over_cache(model, cache, token, place)
    return logits[:, -1]
