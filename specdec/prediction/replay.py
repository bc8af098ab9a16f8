"""Texts that the target wrote, written again without it: what drafters that do not need it would have drafted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import check_kind
from specdec.drafters.base import Drafter, DraftRun
from specdec.generate import generate
from specdec.laws import Law
from specdec.models.target import Scores, Target, TargetRun
from specdec.prediction.text import NotForetold
from specdec.sampling import Sampling
from specdec.trace import Trace
from specdec.tree import DraftTree


def replay(
    prompts: Sequence[Tensor], written: Sequence[Tensor], drafter: Drafter, vocab: int, sampling: Sampling = Sampling()
) -> Trace:
    """The steps in which a drafter would have written these texts together.

    If all children are POINT, sibling rejection accepts a child with the chance that the target's next token is that child, and
    traversal verification likewise. So the texts tell what was accepted. Times of drafting are those of the replay; that of
    the target's passes is next to nothing.

    Args:
        prompts, written: 1-D int64 tensors each: the prompt and the new tokens of each text.
        drafter: one whose children are POINT, and that does not use the target's states or layers.
        vocab: size of the target's vocabulary.
        sampling: how the texts were sampled; without logits processors.

    Raises:
        NotForetold: its children are sampled; run it instead.
        ValueError: the drafter needs a transformers model as target.
    """
    check_kind("drafter", drafter, Drafter)
    if (laws := drafter.spec(sampling).laws) != {Law.POINT}:
        names = ", ".join(law.name for law in sorted(laws))
        raise NotForetold(f"{drafter} draws children by {names}: what is accepted does not follow from a text; run it.")
    target = Recorded([torch.cat(pair) for pair in zip(prompts, written, strict=True)], vocab)
    budgets = [len(new) for new in written]
    options = {"sampling": sampling, "max_new_tokens": budgets, "stop_tokens": ()}
    return generate(target, list(prompts), drafter, **options).trace


class Recorded(Target):
    """A target that gives all weight to the tokens of texts, each after its own prompt. A greedy run writes them again.

    Args:
        texts: 1-D int64 tensors each, with the prompts before them, in the order of the prompts.
        vocab: size of its vocabulary.
    """

    def __init__(self, texts: Sequence[Tensor], vocab: int):
        self.vocab, self.texts = vocab, list(texts)

    def start(self, batch: Batch, states: Sequence[int] = (), last: TargetRun | None = None) -> TargetRun:
        return RecordedRun(self, batch)


class RecordedRun(TargetRun):
    """`Recorded` at work."""

    target: Recorded

    def enter(self, rows: list[int], draft: DraftRun) -> None:
        """Nothing is to be done, as every text is looked up as it is now."""

    def score(self, tree: DraftTree) -> Scores:
        following = torch.zeros_like(tree.tokens)
        for row, text in enumerate(self.batch.texts):
            _, index = self.batch.keys[row]
            whole = self.target.texts[index]
            following[row] = whole[(len(text) + tree.topology.depths[row]).clamp(max=len(whole) - 1)]
        logits = torch.full((*following.shape, self.target.vocab), -torch.inf)
        return Scores(logits.scatter_(2, following[..., None], 0.0))
