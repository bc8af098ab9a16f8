"""Which of its own layers the target should leave out when it drafts for itself, as far as time allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.layer_skip import layers_of, skippable
from specdec.sampling import Sampling
from specdec.training.skip_search import LayerCosts, Rehearsal, Trial, measure_layer_costs, predict, search

# Of the longest chain considered.
DEPTH = 6
# At which chains are tried, of all texts together.
_PLACES = 64
# Of each timing.
_REPEATS = 5


def found(
    model: PreTrainedModel,
    texts: Sequence[tuple[Tensor, Tensor]],
    sampling: Sampling,
    over: Callable[[], bool],
    say: Callable[[str], None],
    costs: LayerCosts | None = None,
) -> tuple[Trial, int]:
    """The best set of layers to leave out by predicted speed-up, and how many sets were tried.

    Args:
        model: the target.
        texts: prompt and new tokens of each.
        sampling: how they were sampled.
        over: whether time is over; one set is tried in any case.
        costs: of layers; measured if not given.
    """
    layers, free = len(layers_of(model)), skippable(model)
    most = min(len(free), layers - 1)
    if most < 1:
        raise ValueError(
            f"The target has {layers} layers, of which {len(free)} can be left out; at least one must stay."
        )
    say("searching layers to leave out")
    context = sum(len(prompt) + len(new) // 2 for prompt, new in texts) // len(texts)
    rehearsal = Rehearsal(model, places(texts), DEPTH, sampling)
    costs = costs or measure_layer_costs(model, DEPTH + 1, context, _REPEATS)
    least = next((n for n in range(1, most + 1) if costs.draft(layers - n) <= costs.verify(1)), most)
    tried: list[Trial] = []

    def trial(skip: frozenset[int]) -> Trial:
        return predict(skip, rehearsal.reach(skip), costs.keeping(layers - len(skip)))

    for each in search(trial, free, least, most):
        if len(each.skip) >= least:
            tried.append(each)
        if over() and tried:
            break
    return max(tried, key=lambda t: t.speed_up), len(tried)


def places(texts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The texts, cut after `DEPTH` tokens from each of some places."""
    if all(len(prompt) < 2 for prompt, _ in texts):
        raise ValueError("Every prompt has one token only, after which layers cannot be tried: choose longer prompts.")
    long = [(prompt, new) for prompt, new in texts if len(new) >= DEPTH and len(prompt) > 1][:_PLACES]
    if not long:
        raise ValueError(
            f"The target ends every text before {DEPTH} tokens: choose other prompts, or own without layers."
        )
    each = max(_PLACES // len(long), 1)
    return [
        torch.cat([prompt, new])[:end]
        for prompt, new in long
        for end in torch.linspace(len(prompt) + DEPTH, len(prompt) + len(new), each).long().unique()
    ]
