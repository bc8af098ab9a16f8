"""Fitting Medusa heads to a frozen target: Medusa-1 (Cai et al., arXiv:2401.10774, section 2.2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafters.medusa import MedusaHeads


@dataclass(frozen=True)
class Places:
    """Places in texts at which heads are trained or tried; head i is to predict labels[:, i]."""

    hidden: Tensor  # [place, hidden]: the target's states
    labels: Tensor  # [place, head] int64: the tokens from the second after the state on; the next one is the LM head's
    laws: Tensor | None  # [place, head, vocab]: the target's law of each label, given the text before it


def places(model: PreTrainedModel, text: Tensor, heads: int, *, laws: bool = False) -> Places:
    """All places of a batch of texts [batch, length] int64 that are followed by `heads` + 1 tokens."""
    with torch.inference_mode():
        hidden = model.base_model(input_ids=text, use_cache=False).last_hidden_state
        targets = model(input_ids=text, use_cache=False).logits.softmax(-1) if laws else None
    count = text.shape[1] - heads - 1

    def ahead(values: Tensor, first: int) -> Tensor:
        """values [batch, length, ...] -> [batch * count, head, ...]: those `first`, `first` + 1, ... places ahead."""
        return torch.stack([values[:, first + i : first + i + count] for i in range(heads)], 2).flatten(0, 1)

    # clone: inference tensors may not be saved for a backward pass
    return Places(
        hidden[:, :count].flatten(0, 1).clone(), ahead(text, 2), None if targets is None else ahead(targets, 1).clone()
    )


def medusa_loss(heads: MedusaHeads, lm_head: nn.Module, at: Places, decay: float = 0.8) -> Tensor:
    """Sum over heads of decay**(i + 1) times the cross-entropy of head i, in nats."""
    logits = heads(at.hidden, lm_head)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), at.labels.flatten(), reduction="none")
    weights = decay ** torch.arange(1, len(heads) + 1, device=losses.device)
    return (losses.view(-1, len(heads)).mean(0) * weights).sum()


@torch.inference_mode()
def acceptance_by_head(heads: MedusaHeads, lm_head: nn.Module, at: Places) -> Tensor:
    """[head]: mean overlap sum min(p, q), the acceptance rate at temperature 1 of one draft after an accepted parent."""
    assert at.laws is not None, "places(..., laws=True) keeps what is needed"
    return torch.minimum(heads(at.hidden, lm_head).softmax(-1), at.laws).sum(-1).mean(0)
