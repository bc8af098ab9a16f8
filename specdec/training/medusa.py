"""Fitting Medusa heads to a frozen target: Medusa-1 (Cai et al., arXiv:2401.10774, section 2.2.1).

Deviations: heads learn to be accepted (by `distillation.lk`), where the paper has them predict tokens by cross-entropy. States
are computed once, and small windows of them are trained on in random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_int
from specdec.drafters.medusa import MedusaHeads
from specdec.training.distillation import lk

_TEXTS = 16  # texts that the target reads at once
_ROUNDING = 1e-3  # most difference between logits of the same head on the same states, relative to the largest


@dataclass(frozen=True)
class Places:
    """Places in texts at which heads are trained or tested."""

    hidden: Tensor  # [place, hidden]: the target's states; head i predicts the token i + 2 places later
    laws: Tensor  # [place, head, vocab]: the target's log-laws of these tokens, given all of the text before them


class States:
    """The target's states over texts of its own, computed once.

    Args:
        model: the target.
        texts: 1-D int64 tensors, prompts included.
        prompt_length: length of every prompt, which is left out, as the target did not write it.
        heads: how many heads are trained.
        window: how many neighbouring places are used together; they share laws, and so cost less.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Tensor], prompt_length: int, heads: int, window: int):
        prompt_length, heads = as_int("prompt_length", prompt_length, 1), as_int("heads", heads, 1)
        window = as_int("window", window, 1)
        head = model.get_output_embeddings()
        assert head is not None
        self.lm_head, self.heads, self.window = head.requires_grad_(False), heads, window
        _check_lm_head(model, texts[0][None])
        parts: list[Tensor] = []
        for start in range(0, len(texts), _TEXTS):
            rows = texts[start : start + _TEXTS]
            ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(model.device)
            with torch.no_grad():
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            parts += [states[prompt_length - 1 : len(row) - 1] for states, row in zip(hidden, rows, strict=True)]
        self.hidden = torch.cat(parts)  # [state, hidden]
        ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        span, begins = window + heads, [0, *ends]
        starts = [torch.arange(a, max(a, b - span + 1)) for a, b in zip(begins, ends, strict=False)]
        self.starts = torch.cat(starts)  # [window] int64: where windows begin that lie within one text
        if not len(self.starts):
            raise ValueError(
                f"No text has the {span} places after its prompt that windows of {window} and {heads} heads need; let the "
                "target write more."
            )

    def places(self, starts: Tensor) -> Places:
        """The places of the windows that begin at `starts` [n] int64."""
        hidden = self.hidden[(starts[:, None] + torch.arange(self.window + self.heads)).to(self.hidden.device)]
        with torch.no_grad():
            laws = self.lm_head(hidden[:, 1:]).float().log_softmax(-1)
        ahead = torch.stack([laws[:, i : i + self.window] for i in range(self.heads)], 2)
        return Places(hidden[:, : self.window].flatten(0, 1), ahead.flatten(0, 1))


def medusa_loss(heads: MedusaHeads, states: States, starts: Tensor) -> Tensor:
    """Mean over places and heads of the negative log of the acceptance rate.

    Deviation: the paper gives later heads less weight. Heads share no weights, and Adam ignores the scale of a loss, so this
    would change nothing.
    """
    at = states.places(starts)
    everywhere = torch.zeros(at.laws.shape[:2], dtype=torch.int64, device=at.laws.device)
    return lk(at.laws, heads(at.hidden, states.lm_head).float().log_softmax(-1), everywhere)


@torch.no_grad()
def acceptance_by_head(heads: MedusaHeads, states: States, starts: Tensor) -> list[float]:
    """[head]: mean overlap sum min(p, q), the acceptance rate at temperature 1 of one draft after an accepted parent."""
    parts = []
    for some in starts.split(_TEXTS):
        at = states.places(some)
        drafted = heads(at.hidden, states.lm_head).float().log_softmax(-1)
        parts.append(torch.minimum(drafted, at.laws).exp().sum(-1))
    return torch.cat(parts).mean(0).tolist()


@torch.no_grad()
def _check_lm_head(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise ValueError unless the model's logits are its LM head's output: laws are computed from states by that head."""
    ids, head = ids.to(model.device), model.get_output_embeddings()
    assert head is not None
    logits = model(input_ids=ids, use_cache=False).logits
    alone = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if (alone - logits).abs().max() > _ROUNDING * logits.abs().max():
        raise ValueError(
            f"{type(model).__name__} does more to its last states than its LM head does (it scales or caps its logits), "
            "so laws cannot be computed from states; train Medusa heads for another target."
        )
