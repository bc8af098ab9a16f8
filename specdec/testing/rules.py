"""Certificates of a rule: that it is exact on every combination of a standard battery, and that its batched code is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch

from specdec.checks import as_int, as_tuple, check_kind
from specdec.drafters import Drafter, NgramDrafter
from specdec.laws import SAMPLED, Law
from specdec.rules import Rule
from specdec.sampling import Sampling
from specdec.testing.fast_paths import measured
from specdec.testing.hard_laws import hard_nodes
from specdec.testing.laws import exact_law, target_law
from specdec.testing.tables import Table, TabularDrafter, TabularTarget
from specdec.trees import Chain, Dynamic, Widths


def assert_lossless(
    rule: Rule, *, drafters: Sequence[Drafter] | None = None, vocab: int = 3, max_new_tokens: int = 3
) -> None:
    """Raise AssertionError unless `rule` is exact on every combination of the standard battery that it admits.

    The battery: chains, IID, without-replacement, sampled-then-top and dynamic trees and n-grams, at temperatures 0.7
    and 1 and with top-k and top-p, with a stop token. `drafters` replaces those of the battery.
    """
    check_kind("rule", rule, Rule)
    vocab, max_new_tokens = as_int("vocab", vocab, 2), as_int("max_new_tokens", max_new_tokens, 1)
    drafters = as_tuple("drafters", () if drafters is None else drafters, "drafters")
    for i, drafter in enumerate(drafters):
        check_kind(f"drafters[{i}]", drafter, Drafter)
    name, admitted, refusal, prompt = type(rule).__name__, 0, None, (0, 1, 0)
    assert rule.lossless, (
        f"{name} does not claim to be lossless (`lossless` is False), so there is nothing to assert: "
        "exact_law(...).total_variation(target_law(...)) measures how far it is off."
    )
    for seed, sampling, drafter in _battery(vocab, drafters):
        try:
            rule.check(drafter.spec(sampling))
        except ValueError as error:
            refusal = error
            continue
        admitted += 1
        depth = 0 if drafters else drafter.spec(sampling).depth
        options: dict[str, Any] = {
            "sampling": sampling,
            "max_new_tokens": max(max_new_tokens, depth + 1),
            "stop_tokens": (vocab - 1,),
        }
        target = TabularTarget(vocab, seed)
        law = exact_law(target, prompt, drafter, rule=rule, **options)
        distance = law.total_variation(target_law(target, prompt, **options))
        what = f"{type(drafter).__name__}({getattr(drafter, 'tree', '')}) under {sampling}"
        assert distance == 0, f"{name} is not lossless: total variation {float(distance):.3g} with {what}"
    assert admitted, f"{name} refuses every drafter of the battery: {refusal}"


def assert_fast_path(rule: Rule) -> None:
    """Raise AssertionError unless the tokens that `rule.decide_batch` emits after a root have the target's law.

    The emitted law is found from the decisions of the batched code in float32, on laws that are hard for floating point: see
    `specdec.testing.fast_paths`. For rules that override `decide_batch`; `assert_lossless` checks `decide`.
    """
    name, refusal, admitted = type(rule).__name__, None, 0
    assert rule.lossless, f"{name} does not claim to be lossless (`lossless` is False), so there is nothing to assert."
    for law, width, sampling in product((Law.POINT, *SAMPLED), (1, 2), (Sampling(1.0), Sampling(0.7, top_k=2))):
        hard = hard_nodes(3, law, width, sampling, torch.float32)
        try:
            rule.check(hard.spec)
        except ValueError as error:
            refusal = error
            continue
        admitted += 1
        for row in measured(rule, hard):
            what = f"{law.name} children, {width} of them, under {sampling}: {row['case']}"
            assert not row["nan"], f"{name}: NaN comes up with {what}"
            assert row["total_variation"] <= row["bound"], (
                f"{name} is not lossless as it runs: total variation {row['total_variation']:.3g}, where rounding may be "
                f"{row['bound']:.1g}, with {what}"
            )
    assert admitted, f"{name} refuses every tree: {refusal}"


def _battery(vocab: int, drafters: Sequence[Drafter] | None) -> Iterable[tuple[int, Sampling, Drafter]]:
    """(seed of the target, sampling, drafter)."""
    wide = [Chain(2), *(Widths((2, 1), law) for law in SAMPLED)]
    deep = [Chain(3), *(Widths((1, 2), law) for law in SAMPLED)]  # siblings below a node that may be rejected
    # Not every seed will do. A wrong residual inside a block shows only where the target's law, times a chance of acceptance
    # below 1, still exceeds the draft's. On many tables (target 0 with draft 1, for instance) it never does.
    for seed, sampling, trees in (
        (8, Sampling(0.7), deep),
        (2, Sampling(1.0), wide),
        (2, Sampling(1.0, top_k=2), wide + deep),
        (2, Sampling(1.0, top_p=0.8), wide + deep),
    ):
        table = Table(vocab, seed + 1)
        standard = [*(TabularDrafter(table, tree) for tree in [*trees, Dynamic(5, 2, 2)]), NgramDrafter(2)]
        for drafter in drafters or standard:
            yield seed, sampling, drafter
