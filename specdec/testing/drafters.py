"""The certificate that a drafter keeps its contract with a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_float, as_int, as_ints, as_tuple, check_kind
from specdec.drafters import BlockDrafter, Drafter, FeatureDrafter
from specdec.generate import generate
from specdec.models.target import Target
from specdec.sampling import Sampling
from specdec.testing.laws import exact_law, target_law
from specdec.testing.noting import Draft, Noting
from specdec.testing.states import assert_served_as_trained
from specdec.testing.tables import TabularTarget

_MOST = 4  # largest vocabulary


def assert_drafter(
    drafter: Drafter,
    target: PreTrainedModel | TabularTarget,
    prompts: Sequence[Sequence[int]],
    *,
    samplings: Sequence[Sampling] = (Sampling(1.0), Sampling(0.7, top_k=2)),
    max_new_tokens: int = 3,
    horizon: int = 12,
    tolerance: float = 1e-12,
) -> None:
    """Raise AssertionError unless `drafter` keeps its contract with `target`.

    >>> assert_drafter(MyDrafter(), specdec.testing.TabularTarget(3), [(0, 1, 0), (2, 1)])

    - The text's law is the target's, with every coin followed: laws are recorded truthfully, and growth does not anticipate.
    - `TreeSpec.by_depth` is kept where it is promised.
    - The greedy text is the target's, and a row's text does not depend on the other rows.
    - A `FeatureDrafter` or `BlockDrafter` drafts by the laws that its network is trained by, at every node of every tree.
    - After any acceptance, and in a row that held another text before, drafts are those of a fresh start from the same text.

    Args:
        drafter: the drafter to examine.
        target: a target with a vocabulary of two to four tokens; if it is a model, in float64.
        prompts: at least two, of different lengths; the first is enumerated.
        samplings: the law is enumerated under each.
        max_new_tokens: new tokens of the enumerated texts.
        horizon: new tokens of the greedy and the batched runs.
        tolerance: largest total variation: float64 logits of one text differ by that much between shapes of a batch.
    """
    check_kind("drafter", drafter, Drafter)
    horizon, tolerance = as_int("horizon", horizon, 1), as_float("tolerance", tolerance, "[0, 1]")
    samplings = as_tuple("samplings", samplings, "Sampling")
    if not samplings:
        raise ValueError("samplings=(): must be at least one, as laws are compared under each.")
    for i, sampling in enumerate(samplings):
        check_kind(f"samplings[{i}]", sampling, Sampling)
    prompts = as_tuple("prompts", prompts, "prompts, each a sequence of token ids")
    prompts = [as_ints(f"prompts[{i}]", prompt, 0) for i, prompt in enumerate(prompts)]
    if len({*map(len, prompts)}) < 2:
        raise ValueError(
            f"prompts={prompts}: must be at least two, of different lengths, as rows of a batch are compared."
        )
    _check_target(target)
    texts = [torch.tensor(prompt) for prompt in prompts]
    for sampling in samplings:
        options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": max_new_tokens}
        noting = Noting(drafter)
        law = exact_law(target, prompts[0], noting, **options)
        distance = float(law.total_variation(target_law(target, prompts[0], **options)))
        assert distance <= tolerance, f"{drafter} changes the law of the text by {distance:.3g} under {sampling}."
        if drafter.spec(sampling).by_depth:
            assert_by_depth(drafter, noting.drafts)
        options = {"sampling": sampling, "max_new_tokens": horizon, "stop_tokens": ()}
        together = generate(target, texts, drafter, **options).tokens
        for row, text in enumerate(texts):  # the same row with other neighbours, as coins belong to the row
            among_its_like = generate(target, [text] * len(texts), drafter, **options).tokens[row]
            assert torch.equal(among_its_like, together[row]), (
                f"{drafter}: the text of a row depends on the other rows, under {sampling}."
            )
    if isinstance(drafter, (FeatureDrafter, BlockDrafter)) and isinstance(target, PreTrainedModel):
        assert_served_as_trained(drafter, target, texts, samplings[0], horizon, tolerance)
    _assert_greedy(drafter, target, texts, horizon)


def _check_target(target: PreTrainedModel | TabularTarget) -> None:
    model = isinstance(target, PreTrainedModel)
    vocab = target.config.get_text_config().vocab_size if model else target.vocab
    if vocab > _MOST:
        raise ValueError(
            f"target has a vocabulary of {vocab} tokens: every draft is enumerated, of at most {_MOST}; use TabularTarget(3), "
            "or a small model."
        )
    if model and target.dtype != torch.float64:
        raise ValueError(f"target is a model in {target.dtype}: laws are compared to 1e-12; call model.double().")


def assert_by_depth(drafter: Drafter, drafts: list[Draft]) -> None:
    """Raise AssertionError unless trees after one text that agree above a depth have the same nodes at that depth."""
    known: dict[tuple, list] = {}
    for draft in drafts:
        for depth in range(1, 1 + max(draft.depths, default=0)):
            above = tuple((i, draft.tokens[i]) for i, at in enumerate(draft.depths) if -1 < at < depth)
            parents = [(i, draft.parents[i]) for i, at in enumerate(draft.depths) if at == depth]
            nodes = [(i, parent, draft.laws[parent]) for i, parent in parents]
            assert known.setdefault((draft.text, depth, above), nodes) == nodes, (
                f"{drafter} promises TreeSpec.by_depth, but after {list(draft.text)} tokens of depth {depth} or below decide "
                f"which nodes of depth {depth} there are, or how they are drawn."
            )


def _assert_greedy(drafter: Drafter, target: PreTrainedModel | Target, texts: list[Tensor], horizon: int) -> None:
    """Raise AssertionError unless the same text always leads to the same draft. Greedy, so that no coin is flipped."""
    for text in texts:
        noting = Noting(drafter)
        options: dict[str, Any] = {"max_new_tokens": horizon, "stop_tokens": ()}
        # the text comes second into its row, where nothing may be left of the first
        first = next(other for other in texts if len(other) != len(text))
        out = generate(target, [first, text], noting, batch_size=1, **options)
        found, expected = out.tokens[1], generate(target, text, **options).tokens[0]
        assert torch.equal(found, expected), f"{drafter}: the greedy text {found.tolist()} is not {expected.tolist()}."
        for draft in (draft for draft, step in zip(noting.drafts, out.trace.steps, strict=True) if step.held == [1]):
            fresh, left = Noting(drafter), len(text) + horizon - len(draft.text)
            generate(target, torch.tensor(draft.text), fresh, max_new_tokens=left, stop_tokens=())
            assert fresh.drafts[0].kept == draft.kept, (
                f"{drafter} drafts {draft.kept} after {list(draft.text)}, and {fresh.drafts[0].kept} afresh."
            )
