"""What is foretold of every drafter, tree and rule, the most promising first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdec.drafters import BlockDrafter, Paused, TreeDrafter
from specdec.laws import Law
from specdec.prediction import Text, read_along
from specdec.rules import BlockVerification, Rule, SiblingRejection, TraversalVerification
from specdec.trees import Chain, Static, TreePolicy, Widths
from specdec.tuning import shapes
from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import Candidate, can_be_replayed, of_replays, of_tree, replayed
from specdec.tuning.measuring import Conditions, deepest, rules
from specdec.tuning.offers import Offer
from specdec.tuning.prices import Prices
from specdec.tuning.rows import Row, Speedup
from specdec.tuning.writing import Written

_FEW = 6  # texts that tell which shapes are promising
_LAW = Law.SAMPLED_THEN_TOP  # no law with as many children is accepted more often


def foretold(
    offer: Offer, prompts: Sequence[Tensor], written: Sequence[Written], conditions: Conditions, prices: Prices
) -> Iterator[Row]:
    """The candidates of a drafter, one after the other; without a prediction where only decoding can tell."""
    if can_be_replayed(offer.drafter):
        yield from _replayed(offer, prompts, written, conditions, prices)
    elif _known(offer, prices):
        yield from _trees(offer, prompts, written, conditions, prices)
    else:
        yield Row(Candidate(offer.name, offer.drafter, SiblingRejection()), None, Speedup())


def _known(offer: Offer, prices: Prices) -> bool:
    """Whether its trees can be chosen, and foretold."""
    stops = isinstance(offer.drafter, BlockDrafter) and offer.drafter.confidence is not None
    return isinstance(offer.drafter, TreeDrafter) and not stops and prices.knows(offer.name)


def _replayed(
    offer: Offer, prompts: Sequence[Tensor], written: Sequence[Written], conditions: Conditions, prices: Prices
) -> Iterator[Row]:
    samples = sorted({text.sample for text in written})  # texts of one prompt are replayed apart
    groups = [
        group
        for sample in samples
        for group in grouped([text for text in written if text.sample == sample], conditions.batch)
    ]
    pairs = [([prompts[text.prompt] for text in group], [text.new for text in group]) for group in groups]
    given = offer.drafter
    for drafter in [given] if isinstance(given, Paused) else [given, Paused(given)]:
        candidate = Candidate(offer.name, drafter, SiblingRejection())
        padded = drafter.spec(conditions.sampling).nodes if conditions.engine().captures else None
        traces = replayed(candidate, pairs, conditions.target.vocab, conditions.sampling, prices, padded)
        found = of_replays(traces, prices, padded)
        yield Row(candidate, found, Speedup(found.speedup))


def grouped(texts: Sequence[Written], batch: int) -> list[list[Written]]:
    """Groups of so many texts that step together; the last one is left out if it is smaller, unless it is alone."""
    groups = [list(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    return groups if len(groups) == 1 else [group for group in groups if len(group) == batch]


def _trees(
    offer: Offer, prompts: Sequence[Tensor], written: Sequence[Written], conditions: Conditions, prices: Prices
) -> Iterator[Row]:
    drafter = offer.drafter
    assert isinstance(drafter, TreeDrafter)
    depth = deepest(drafter)
    texts = read(drafter, prompts, written, conditions, depth)
    if not texts:
        yield Row(Candidate(offer.name, drafter, SiblingRejection()), None, Speedup())
        return
    acceptance = shapes.positional([own[0] for own in texts[:_FEW]], depth, _LAW)
    first = rules(conditions.sampling)[-1]
    proposals = shapes.proposed(acceptance, prices.costs(offer.name, type(first).__name__, shapes.NODES))
    if (own := _parents(drafter.tree)) is not None:
        proposals = list(dict.fromkeys([*proposals, own]))
    for parents in proposals:
        for rule in suited(parents, rules(conditions.sampling)):
            candidate = Candidate(offer.name, drafter.with_tree(tree_of(parents)), rule, parents)
            found = of_tree(candidate, texts, prices)
            yield Row(candidate, found, Speedup(found.speedup))
    if own is None:  # a tree that changes from step to step
        yield Row(Candidate(offer.name, drafter, SiblingRejection()), None, Speedup())


def read(
    drafter: TreeDrafter, prompts: Sequence[Tensor], written: Sequence[Written], conditions: Conditions, depth: int
) -> list[list[Text]]:
    """For each prompt, both models' laws along its texts; nothing if they cannot be known."""
    found: dict[int, list[Text]] = {}
    try:
        for text in written:
            prompt = prompts[text.prompt]
            whole = torch.cat([prompt, text.new])
            made = read_along(conditions.target, drafter, whole, len(prompt), conditions.sampling, depth)
            found.setdefault(text.prompt, []).append(made)
    except (ValueError, NotImplementedError):
        return []
    return [*found.values()]


def suited(parents: Sequence[int], among: Sequence[Rule]) -> list[Rule]:
    """The rules that are for such a tree: on chains, block verification is traversal verification."""
    chain = list(parents) == list(range(-1, len(parents) - 1))
    other = TraversalVerification if chain else BlockVerification
    return [rule for rule in among if not isinstance(rule, other)]


def tree_of(parents: Sequence[int]) -> Static | Widths:
    """The policy that grows trees of this shape."""
    if list(parents) == list(range(-1, len(parents) - 1)):
        return Chain(len(parents) - 1)
    return Static(parents, _LAW)


def _parents(tree: TreePolicy) -> tuple[int, ...] | None:
    """The shape of a policy's trees, if it is fixed."""
    return tuple(tree.parents) if isinstance(tree, (Static, Widths)) else None


def best_first(rows: Sequence[Row]) -> list[Row]:
    """Those that were decoded, then those that were foretold only, then the others."""

    def key(row: Row) -> tuple[bool, bool, float]:
        known = row.speedup.estimate
        return row.speedup.measured is None, known is None, -known.value if known else 0.0

    return sorted(rows, key=key)


def finalists(rows: Sequence[Row], most: int) -> list[Row]:
    """The best that were foretold, at most two of one drafter; and those of which only decoding can tell."""
    chosen: list[Row] = []
    for row in best_first(rows):
        same = sum(other.candidate.name == row.candidate.name for other in chosen)
        if row.foretold is not None and same < 2 and len(chosen) < most:
            chosen.append(row)
    return [*chosen, *(row for row in rows if row.foretold is None)]


def measured(row: Row, found: Estimate) -> Row:
    """The row with what was measured of it."""
    return replace(row, speedup=replace(row.speedup, measured=found))
