"""What is foretold of every drafter, tree and rule, the most promising first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafters import BlockDrafter, Paused, TreeDrafter
from specdec.laws import Law
from specdec.prediction import Text, read_along, replay
from specdec.rules import BlockVerification, Rule, SiblingRejection, TraversalVerification
from specdec.trees import Chain, Static, Widths
from specdec.tuning import shapes
from specdec.tuning.conditions import Conditions, rules
from specdec.tuning.foretold import LEAST, Candidate, can_be_replayed, of_replays, of_tree, replayed
from specdec.tuning.offers import Offer
from specdec.tuning.prices import Prices
from specdec.tuning.probes import Stars, deepest
from specdec.tuning.rows import Row
from specdec.tuning.shapes import is_chain, parents_of
from specdec.tuning.writing import Written

# Texts that tell which shapes are promising.
_FEW = 6
# No law with as many children is accepted more often.
_LAW = Law.SAMPLED_THEN_TOP


@dataclass(frozen=True)
class Known:
    """What candidates are foretold from.

    Args:
        prompts, written: the texts.
        conditions: of all runs.
        prices: of steps.
        over: whether there is no time to read or replay one more text.
    """

    prompts: Sequence[Tensor]
    written: Sequence[Written]
    conditions: Conditions
    prices: Prices
    over: Callable[[], bool]


def foretold(offer: Offer, known: Known) -> Iterator[Row]:
    """The candidates of a drafter, one after the other; without a prediction where only decoding can tell."""
    if can_be_replayed(offer.drafter):
        yield from _replayed(offer, known)
    elif untold := _untold(offer, known.prices):
        yield Row(Candidate(offer.name, offer.drafter, SiblingRejection()), untold=untold)
    else:
        yield from _trees(offer, known)


def _untold(offer: Offer, prices: Prices) -> str:
    """Why only decoding can tell what a drafter gives; "" if its trees can be chosen and foretold."""
    if not isinstance(offer.drafter, TreeDrafter):
        return (
            f"what a {type(offer.drafter).__name__} drafts follows neither from the text nor from the shape of a tree."
        )
    if isinstance(offer.drafter, BlockDrafter) and offer.drafter.confidence is not None:
        return "where it stops depends on its confidence."
    return "" if prices.knows(offer.name) else "time ended before steps with its trees were measured."


def _replayed(offer: Offer, known: Known) -> Iterator[Row]:
    conditions, prices, over = known.conditions, known.prices, known.over
    groups = whole_groups(known.written, conditions.batch)
    pairs = [([known.prompts[text.prompt] for text in group], [text.new for text in group]) for group in groups]
    given, captures = offer.drafter, conditions.engine().static_shapes
    idle = replay(*pairs[0], Stars([1]), conditions.target.vocab, conditions.sampling)
    # the paused one first, as it costs least where drafts do not pay: there may be no time for the other
    for drafter in [given] if isinstance(given, Paused) else [Paused(given), given]:
        padded = drafter.spec(conditions.sampling).nodes if captures else None
        traces = replayed(drafter, pairs, conditions.target.vocab, conditions.sampling, prices, over, padded)
        # as many for the next one, which is asked for later
        pairs, over = pairs[: len(traces)], _never
        owners = [text.prompt for group in groups[: len(traces)] for text in group]
        yield Row(Candidate(offer.name, drafter, SiblingRejection()), of_replays(traces, idle, owners, prices, padded))


def _never() -> bool:
    return False


def whole_groups(texts: Sequence[Written], batch: int) -> list[list[Written]]:
    """Groups of so many texts that step together; the last one is left out if it is smaller, unless it is alone."""
    groups = [list(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    return groups if len(groups) == 1 else [group for group in groups if len(group) == batch]


def _trees(offer: Offer, known: Known) -> Iterator[Row]:
    drafter, prices = offer.drafter, known.prices
    assert isinstance(drafter, TreeDrafter)
    every = [rule for rule in rules(known.conditions.sampling) if prices.tells(offer.name, type(rule).__name__)]
    depth = deepest(drafter)
    try:
        texts = read(drafter, known, depth)
    except ValueError as error:
        yield Row(Candidate(offer.name, drafter, SiblingRejection()), untold=str(error))
        return
    acceptance = shapes.positional([own[0] for own in texts[:_FEW]], depth, _LAW)
    proposals = shapes.proposed(acceptance, prices.costs(offer.name, type(every[-1]).__name__, shapes.NODES))
    if (own := parents_of(drafter)) is not None:
        proposals = list(dict.fromkeys([*proposals, own]))
    for parents in proposals:
        for rule in suited(parents, every):
            candidate = Candidate(offer.name, drafter.with_tree(tree_of(parents)), rule)
            yield Row(candidate, of_tree(candidate, texts, prices))
    if own is None:
        untold = "its own tree changes from step to step."
        yield Row(Candidate(offer.name, drafter, SiblingRejection()), untold=untold)


def read(drafter: TreeDrafter, known: Known, depth: int) -> list[list[Text]]:
    """For each prompt, both models' laws along its texts: of the first `LEAST` texts, and of others until time is over.

    Raises:
        ValueError: they cannot be known.
    """
    found: dict[int, list[Text]] = {}
    target, sampling = known.conditions.target, known.conditions.sampling
    for count, text in enumerate(known.written, 1):
        prompt = known.prompts[text.prompt]
        whole = torch.cat([prompt, text.new])
        made = read_along(target, drafter, whole, len(prompt), sampling, depth)
        found.setdefault(text.prompt, []).append(made)
        if count >= LEAST and known.over():
            break
    return [*found.values()]


def suited(parents: Sequence[int], among: Sequence[Rule]) -> list[Rule]:
    """The rules that are for such a tree: on chains, block verification is traversal verification."""
    other = TraversalVerification if is_chain(parents) else BlockVerification
    return [rule for rule in among if not isinstance(rule, other)]


def tree_of(parents: Sequence[int]) -> Static | Widths:
    """The policy that grows trees of this shape."""
    if is_chain(parents):
        return Chain(len(parents) - 1)
    return Static(parents, _LAW)


def best_first(rows: Sequence[Row]) -> list[Row]:
    """Those that were decoded, then those that were foretold only, then the others."""

    def key(row: Row) -> tuple[bool, bool, float]:
        known = row.speedup.estimate
        return row.measured is None, known is None, -known.value if known else 0.0

    return sorted(rows, key=key)


def finalists(rows: Sequence[Row], most: int) -> list[Row]:
    """The best that were foretold, at most two of one drafter and none that is surely slower than the best; and those of which
    only decoding can tell.
    """
    told = [(row, row.foretold.speedup) for row in best_first(rows) if row.foretold is not None]
    chosen: list[Row] = []
    for row, speed in told:
        same = sum(other.candidate.name == row.candidate.name for other in chosen)
        slower = told[0][1].low is not None and speed.below(told[0][1].low)
        if same < 2 and len(chosen) < most and not slower:
            chosen.append(row)
    return [*chosen, *(row for row in rows if row.foretold is None)]
