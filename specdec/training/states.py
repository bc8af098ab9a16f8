"""Fitting networks on the target's states, on text of its own making: training-time test for features, anchors for blocks.

Training-time test (EAGLE-3, Li et al., arXiv:2503.01840): a network that goes on from its own outputs is trained on these.
Random anchors (DFlash, DSpark): a network that drafts blocks is trained on some places of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from specdec.checks import as_int
from specdec.drafters.block import BlockNet
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.drafters.teacher_forcing import drafts_along, read_texts

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # one of `specdec.training.distillation`


@dataclass(frozen=True)
class Depth:
    """What is drafted at one depth below many places of texts.

    Args:
        target_law: [batch, place, vocab]: the target's log-probabilities of the tokens that the network can draft.
        draft_law: [batch, place, vocab]: the network's.
        tokens: [batch, place] int64: the text's token there, by the network's ids; negative if that is none of them, or not to
            be learnt.
        written: [batch, place] bool: whether the target wrote it.
    """

    target_law: Tensor
    draft_law: Tensor
    tokens: Tensor
    written: Tensor


def drafted(
    net: StatesNet,
    target: PreTrainedModel,
    tokens: Tensor,
    depth: int,
    prompt_length: int = 1,
    anchors: int = 16,
    generator: torch.Generator | None = None,
) -> list[Depth]:
    """What a network drafts along texts, by depth; gradients flow to the network alone.

    Args:
        net: the network.
        target: the target, which is only read.
        tokens: [batch, t] int64: texts that the target wrote.
        depth: how deep.
        prompt_length: how many tokens of each text the target has not written.
        anchors: places per text at which a `BlockNet` drafts, chosen at random; a `FeatureNet` drafts at all.
        generator: of the random choice.
    """
    depth = as_int("depth", depth, 1, net.depth if isinstance(net, BlockNet) else 2**16)
    if tokens.shape[1] <= (least := max(depth, getattr(net, "depth", 0)) + 1):
        raise ValueError(f"Texts of {tokens.shape[1]} tokens have no room for drafts; use texts of more than {least}.")
    states, logits = read_texts(target, tokens, net.states)
    roots = _anchors(net, tokens, anchors, generator)
    places, found = drafts_along(net, tokens, states, TargetParts.of(target, net), depth, roots)
    laws, own = logits.float().log_softmax(-1), tokens
    if net.target_ids is not None:
        laws = laws[..., net.target_ids]
        names = torch.full((logits.shape[2],), -1, device=tokens.device)
        names[net.target_ids] = torch.arange(len(net.target_ids), device=tokens.device)
        own = names[tokens]
    written = torch.arange(tokens.shape[1], device=tokens.device) >= prompt_length
    own = pad(torch.where(written, own, -1), (0, 1), value=-1)  # nothing comes after the text
    written, rows = pad(written, (0, 1)), torch.arange(len(tokens), device=tokens.device)[:, None]
    return [
        Depth(laws[rows, places + d], q.float().log_softmax(-1), own[rows, places + d + 1], written[places + d + 1])
        for d, q in enumerate(found)
    ]


def _anchors(net: StatesNet, tokens: Tensor, count: int, generator: torch.Generator | None) -> Tensor | None:
    """[batch, count] int64: random places to draft at, for a `BlockNet`; None for all, for a `FeatureNet`."""
    if not isinstance(net, BlockNet):
        return None
    batch, length = tokens.shape
    return torch.randint(1, length - net.depth + 1, (batch, count), generator=generator).to(tokens.device)


def states_loss(loss: Loss, found: Sequence[Depth], decay: float = 0.8) -> Tensor:
    """The sum over depths of decay ** depth times a loss."""
    return sum((decay**d * loss(at.target_law, at.draft_law, at.tokens) for d, at in enumerate(found)), torch.zeros(()))


@torch.no_grad()
def acceptance(found: Sequence[Depth]) -> list[float]:
    """By depth: an unbiased estimate of the chance that a drafted chain is accepted so far, by token-level rejection.

    As in `distillation.acceptance_by_depth`, but a draft's law may depend on where its chain began. Along a text x of the
    target the weight is w_d = w_d-1 min(1, q_d(x_d) / p_d(x_d)), and the chance of depth d is w_d-1 sum min(p_d, q_d). One
    plus the sum of the chances is the expected acceptance length, over all places of the texts.
    """
    weight, chances = torch.ones(()), []
    for at in found:
        overlap = torch.minimum(at.target_law, at.draft_law).exp().sum(-1)
        chances.append(float((weight * overlap)[found[0].written & at.written].mean()))
        p, q = (law.gather(-1, at.tokens.clamp(min=0)[..., None])[..., 0] for law in (at.target_law, at.draft_law))
        weight = torch.where(at.tokens >= 0, weight * (q - p).clamp(max=0).exp(), 0)
    return chances
