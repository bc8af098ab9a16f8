"""Fitting networks on the target's states, on text of its own making: training-time test for features, anchors for blocks.

Training-time test (EAGLE-3, Li et al., arXiv:2503.01840): a network that goes on from its own outputs is trained on these.
Random anchors (DFlash, DSpark): a network that drafts blocks is trained on some places of a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from specdec.checks import as_int
from specdec.drafters.block import BlockNet
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.drafters.teacher_forcing import Drafts, drafts_along
from specdec.drafters.text_states import logits_of
from specdec.training.distillation import Loss, overlap
from specdec.training.features import TargetTexts


@dataclass(frozen=True, eq=False)
class DepthLaws:
    """What is drafted at one depth below some places of texts.

    Args:
        target_law: [batch, place, vocab]: the target's log-probabilities of the tokens that the network can draft.
        draft_law: [batch, place, vocab]: the network's.
        tokens: [batch, place] int64: the text's token there, by the network's ids; negative if that is none of them, or not to
            be learnt.
        confidence: [batch, place]: how probably the network expects its token to be accepted; None if it does not tell.
    """

    target_law: Tensor
    draft_law: Tensor
    tokens: Tensor
    confidence: Tensor | None

    @property
    def overlap(self) -> Tensor:
        """[batch, place]: sum min(p, q), the rate at which one draft is accepted at temperature 1."""
        return overlap(self.target_law, self.draft_law)


class Comparison:
    """What a network drafts along texts, beside what the target says there; gradients flow to the network alone.

    Args:
        net: the network.
        target: the target, which is only asked for its laws.
        text: the texts.
        depth: how deep.
        anchors: places per text at which a `BlockNet` drafts, chosen at random; None for all. A `FeatureNet` always
            drafts at all.
        generator: of the random choice.

    Attributes:
        places: [batch, place, depth] int64: the token above each draft.
        written: [batch, place, depth] bool: whether the target wrote the token there.
        tokens: [batch, place, depth] int64: the text's, see `DepthLaws.tokens`.
    """

    def __init__(
        self,
        net: StatesNet,
        target: PreTrainedModel,
        text: TargetTexts,
        depth: int,
        anchors: int | None = None,
        generator: torch.Generator | None = None,
    ):
        tokens, length = text.tokens, text.tokens.shape[1]
        depth = as_int("depth", depth, 1, net.depth if isinstance(net, BlockNet) else 2**16)
        if length <= depth + 1:
            raise ValueError(
                f"Texts of {length} tokens have no room for drafts; use texts of more than {depth + 1} tokens."
            )
        roots = None
        if isinstance(net, BlockNet) and anchors is not None:
            shape = len(tokens), as_int("anchors", anchors, 1)
            roots = torch.randint(1, length - depth + 1, shape, generator=generator).to(tokens.device)
        self.drafts: Drafts = drafts_along(net, tokens, text.states, TargetParts.of(target, net), depth, roots)
        self._target, self._ids, self._hidden = target, net.target_ids, text.hidden
        self.places = self.drafts.roots[..., None] + torch.arange(depth, device=tokens.device)
        written = torch.arange(length + 1, device=tokens.device) >= text.prompt_length
        written[length] = False  # nothing comes after the text
        rows = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        self.written = written[self.places + 1]
        own = pad(self._by_network(tokens, target), (0, 1))[rows, self.places + 1]
        self.tokens = torch.where(self.written, own, -1)

    def _by_network(self, tokens: Tensor, target: PreTrainedModel) -> Tensor:
        """[batch, t] int64: the network's ids of the target's tokens, -1 for those that it lacks."""
        if self._ids is None:
            return tokens
        names = tokens.new_full((target.config.get_text_config().vocab_size,), -1)
        names[self._ids] = torch.arange(len(self._ids), device=tokens.device)
        return names[tokens]

    def at(self, part: slice) -> list[DepthLaws]:
        """By depth, for some of the places."""
        rows = torch.arange(len(self.tokens), device=self.tokens.device)[:, None]
        found = []
        for d, drafted in enumerate(self.drafts.at(part)):
            law = _law(logits_of(self._target, self._hidden[rows, self.places[:, part, d]]))
            law = law if self._ids is None else law[..., self._ids]
            found.append(DepthLaws(law, _law(drafted.logits), self.tokens[:, part, d], drafted.confidence))
        return found

    def parts(self, laws_at_once: int) -> Iterator[slice]:
        """All places, as many together as have at most so many probabilities in the laws of either model; at least one."""
        batch, places, depth = self.tokens.shape
        size = max(1, laws_at_once // (batch * depth * self._target.config.get_text_config().vocab_size))
        return (slice(start, start + size) for start in range(0, places, size))


def states_loss(loss: Loss, comparison: Comparison, decay: float = 0.8, laws_at_once: int = 2**26) -> Tensor:
    """The sum over depths of decay ** depth times a loss, and how far confidences are from what they tell of.

    Laws over large vocabularies are made for some places at a time, and again when gradients are asked for, so that
    `laws_at_once` bounds the memory that they take.

    Args:
        loss: a mean over places.
        comparison: what is drafted, and what the target says there.
        decay: the weight of each depth beside the one before.
        laws_at_once: most probabilities in the laws that are kept at once, of either model.
    """
    counts = (comparison.tokens >= 0).sum((0, 1)).tolist()

    def of(part: slice) -> Tensor:
        total = torch.zeros((), device=comparison.tokens.device)
        for d, at in enumerate(comparison.at(part)):
            if here := int((at.tokens >= 0).sum()):
                total = total + decay**d * here / counts[d] * (loss(at.target_law, at.draft_law, at.tokens) + _sure(at))
        return total

    first, *others = comparison.parts(laws_at_once)
    if not others:
        return of(first)
    return torch.stack([checkpoint(of, part, use_reentrant=False) for part in (first, *others)]).sum()


def _sure(at: DepthLaws) -> Tensor:
    """The cross-entropy of acceptance under the confidences, where the network tells any (DSpark, arXiv:2607.05147)."""
    if at.confidence is None:
        return torch.zeros(())
    known = at.tokens >= 0
    rates = at.overlap.detach()[known].clamp(0, 1)
    return binary_cross_entropy(at.confidence[known].to(rates), rates)


def _law(logits: Tensor) -> Tensor:
    """[..., vocab]: log-probabilities, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def acceptance(comparison: Comparison, laws_at_once: int = 2**26) -> Tensor:
    """[depth]: the rate at which a draft is accepted at temperature 1 if those before it in the text were, 1 - TV."""
    written = comparison.written
    sums = torch.zeros(written.shape[2])
    for part in comparison.parts(laws_at_once):
        laws = comparison.at(part)
        sums += torch.tensor([float(at.overlap[written[:, part, d]].sum()) for d, at in enumerate(laws)])
    return sums / written.sum((0, 1)).cpu()
