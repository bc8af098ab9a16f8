"""Fitting networks on the target's states, on text of its own making: training-time test for features, anchors for blocks.

Training-time test (EAGLE-3, Li et al., arXiv:2503.01840): a network that goes on from its own outputs is trained on these.
Random anchors (DFlash, DSpark): a network that drafts blocks is trained on some places of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
        tokens: [batch, place] int64: the text's token there, by the network's ids; negative if that is none of them, or if the
            target did not write it.
        reached: [batch, place] bool: whether the target wrote it, below drafts that the network could draft.
        confidence: [batch, place]: how probably the network expects its token to be accepted; None if it does not tell.
    """

    target_law: Tensor
    draft_law: Tensor
    tokens: Tensor
    reached: Tensor
    confidence: Tensor | None

    @property
    def overlap(self) -> Tensor:
        """[batch, place]: sum min(p, q), the rate at which one draft is accepted at temperature 1."""
        return overlap(self.target_law, self.draft_law)


class Comparison:
    """What a network drafts along texts, beside what the target says there; gradients flow to the network alone.

    Args:
        net: the network.
        target: the target, frozen, which is only asked for its laws.
        text: the texts.
        depth: how deep.
        anchors: most places per text at which a `BlockNet` drafts, chosen at random from those that the target wrote a token
            after; None for all. A `FeatureNet` always drafts at all.
        generator: of the random choice.

    Attributes:
        places: [batch, place, depth] int64: the token above each draft.
        reached: [batch, place, depth] bool, and
        tokens: [batch, place, depth] int64: see `DepthLaws`.
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
        _check_frozen(target)
        depth = as_int("depth", depth, 1, net.depth if isinstance(net, BlockNet) else 2**16)
        if text.tokens.shape[1] < 2:
            raise ValueError("Texts of 1 token leave nothing to draft; use longer ones.")
        text = text.padded(depth - 1)  # there is room for drafts below the last token but one
        length, tokens = text.tokens.shape[1], text.tokens.clamp(min=0)
        by_target = text.tokens.where(torch.arange(length, device=tokens.device) >= text.prompt_lengths[:, None], -1)
        by_target = pad(by_target, (0, 1), value=-1)  # nothing comes after a text
        roots = None
        if isinstance(net, BlockNet) and anchors is not None:
            roots = _anchors(by_target[:, 2 : length - depth + 2], as_int("anchors", anchors, 1), generator)
        self.drafts: Drafts = drafts_along(net, tokens, text.states, TargetParts.of(target, net), depth, roots)
        self._target, self._ids, self._hidden, self._everywhere = target, net.target_ids, text.hidden, roots is None
        self.places = self.drafts.roots[..., None] + torch.arange(depth, device=tokens.device)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        written = by_target[rows, self.places + 1] >= 0
        own = pad(self._by_network(tokens, target), (0, 1))[rows, self.places + 1]
        self.tokens = torch.where(written, own, -1)
        lacking = pad((written & (own < 0))[..., :-1], (1, 0)).cumsum(-1)  # of the drafts above
        self.reached = written & (lacking == 0)

    def _by_network(self, tokens: Tensor, target: PreTrainedModel) -> Tensor:
        """[batch, t] int64: the network's ids of the target's tokens, -1 for those that it lacks."""
        if self._ids is None:
            return tokens
        names = tokens.new_full((target.config.get_text_config().vocab_size,), -1)
        names[self._ids] = torch.arange(len(self._ids), device=tokens.device)
        return names[tokens]

    def at(self, part: slice) -> list[DepthLaws]:
        """By depth, for some of the places."""
        drafted, laws = self.drafts.at(part), self._target_laws(part)
        own, reached = self.tokens[:, part].unbind(2), self.reached[:, part].unbind(2)
        by_depth = zip(laws, drafted, own, reached, strict=True)
        return [
            DepthLaws(law, _law(each.logits), tokens, below, each.confidence) for law, each, tokens, below in by_depth
        ]

    def _target_laws(self, part: slice) -> list[Tensor]:
        """By depth, [batch, n, vocab]: the target's."""
        places = self.places[:, part]
        rows, (n, depth) = torch.arange(len(places), device=places.device)[:, None], places.shape[1:]
        if self._everywhere:  # depths share their places
            law = self._law_where(self._hidden[:, int(places[0, 0, 0]) :][:, : n + depth - 1])
            return [law[:, d : d + n] for d in range(depth)]
        law = self._law_where(self._hidden[rows, places.flatten(1)])
        return list(law.unflatten(1, (n, depth)).unbind(2))

    def _law_where(self, hidden: Tensor) -> Tensor:
        """[batch, n, vocab]: the target's, of the tokens that the network can draft, where its LM head reads these."""
        law = _law(logits_of(self._target, hidden))
        return law if self._ids is None else law[..., self._ids]

    def parts(self, laws_at_once: int) -> Iterator[slice]:
        """All places, as many together as have at most so many probabilities in the laws of either model; at least one."""
        batch, places, depth = self.tokens.shape
        size = max(1, laws_at_once // (batch * depth * self._target.config.get_text_config().vocab_size))
        return (slice(start, start + size) for start in range(0, places, size))


def _anchors(after: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    """[batch, n] int64: places at random. Others than those that the target wrote a token after are of no account.

    Args:
        after: [batch, place] int64: the token after place 1, 2, ...; negative if the target did not write it.
    """
    order = torch.rand(after.shape, generator=generator).to(after.device) + (after < 0)
    return 1 + order.topk(min(most, after.shape[1]), largest=False).indices


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
    counts, reached = ((part.sum((0, 1))).tolist() for part in (comparison.tokens >= 0, comparison.reached))

    def of(part: slice) -> Tensor:
        # it asks for gradients even of texts from which there is nothing to learn
        total = torch.zeros((), device=comparison.tokens.device, requires_grad=True)
        for d, at in enumerate(comparison.at(part)):
            if here := int((at.tokens >= 0).sum()):
                total = total + decay**d * here / counts[d] * loss(at.target_law, at.draft_law, at.tokens)
            if at.confidence is not None and (here := int(at.reached.sum())):
                total = total + decay**d * here / reached[d] * _surprise(at.confidence, at.overlap.detach(), at.reached)
        return total

    first, *others = comparison.parts(laws_at_once)
    if not others:
        return of(first)
    return torch.stack([checkpoint(of, part, use_reentrant=False) for part in (first, *others)]).sum()


def _surprise(confidence: Tensor, rates: Tensor, where: Tensor) -> Tensor:
    """The cross-entropy of being accepted at these rates under the confidences (DSpark, arXiv:2607.05147)."""
    rates = rates[where].clamp(0, 1)
    with torch.autocast(rates.device.type, enabled=False):  # GPUs refuse it under autocast, whatever the dtype
        return binary_cross_entropy(confidence[where].to(rates), rates)


def _law(logits: Tensor) -> Tensor:
    """[..., vocab]: log-probabilities, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def acceptance(comparisons: Iterable[Comparison], laws_at_once: int = 2**26) -> Tensor:
    """[depth]: 1 - TV, the rate at which drafts that the text leads to are accepted at temperature 1 (`DepthLaws.reached`)."""
    sums, counts = 0, 0
    for comparison in comparisons:
        counts = counts + comparison.reached.sum((0, 1)).cpu()
        for part in comparison.parts(laws_at_once):
            sums = sums + torch.tensor([float(at.overlap[at.reached].sum()) for at in comparison.at(part)])
    return torch.as_tensor(sums / counts)


def _check_frozen(target: PreTrainedModel) -> None:
    """Raise ValueError if gradients would pile up in the parts of the target that networks share."""
    shared: tuple[Any, ...] = (target.get_input_embeddings(), target.get_output_embeddings())
    if torch.is_grad_enabled() and any(p.requires_grad for part in shared for p in part.parameters()):
        raise ValueError("The target's embedding or LM head asks for gradients; call target.requires_grad_(False).")
