"""Whether a draft is read as it was trained. Files do not say which layers they mean, and one read wrongly still drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_int, as_ints, as_tuple, check_kind
from specdec.drafters.block import BlockDrafter, BlockNet
from specdec.drafters.feature import FeatureDrafter
from specdec.drafters.states_net import TargetParts
from specdec.drafters.teacher_forcing import drafts_along
from specdec.drafters.text_states import logits_of, read_texts
from specdec.models.ready import cure_for


@dataclass(frozen=True, eq=False)
class Reading:
    """How well a draft agrees with its target if it is read in one way.

    Args:
        name: what differs from the way that was taken; "as taken".
        overlaps: [place, depth]: sum min(p, q), the rate at which one draft is accepted there at temperature 1.
        same: [depth]: how often both find the same token most likely.
    """

    name: str
    overlaps: Tensor
    same: Tensor

    @property
    def overlap(self) -> float:
        """The mean over places and depths."""
        return float(self.overlaps.mean())

    def ahead(self, other: Reading) -> bool:
        """Whether it agrees better than another by more than three standard errors, place by place."""
        n = min(len(self.overlaps), len(other.overlaps))
        lead = (self.overlaps[:n] - other.overlaps[:n]).mean(1)
        return float(lead.mean()) > 3 * float(lead.std()) / n**0.5


@dataclass(frozen=True, eq=False)
class Readings:
    """How well a draft agrees with its target, read as it is and in neighbouring ways. Print it for a table.

    Args:
        taken: as the drafter reads it now.
        others: as it might have been meant.
    """

    taken: Reading
    others: tuple[Reading, ...]

    @property
    def best(self) -> Reading:
        """The reading to take: as it is, unless another one is clearly better."""
        better = [reading for reading in self.others if reading.ahead(self.taken)]
        return max(better, key=lambda reading: reading.overlap, default=self.taken)

    def __str__(self) -> str:
        rows, (places, depths) = [self.taken, *self.others], self.taken.overlaps.shape
        head = [f"{places} places", *(f"depth {d}: 1 - TV, same top" for d in range(1, depths + 1))]
        wide = max(map(len, (head[0], *(reading.name for reading in rows))))
        lines = [f"{head[0]:{wide}}  {'  '.join(head[1:])}"]
        for reading in rows:
            means = zip(reading.overlaps.mean(0).tolist(), reading.same.tolist(), strict=True)
            cells = "  ".join(f"{o:13.3f}  {s:9.3f}" for o, s in means)
            lines.append(f"{reading.name:{wide}}  {cells}{'  <- take this' if reading is self.best else ''}")
        return "\n".join(lines)


def check(
    target: PreTrainedModel,
    drafter: FeatureDrafter | BlockDrafter,
    texts: Sequence[Tensor | Sequence[int]],
    depth: int = 2,
) -> Readings:
    """Compare how a draft is read with the ways in which its file may have been meant.

    Layer ids mean four things in five code bases, and flags have opposite defaults. A draft that is read one layer off still
    drafts, only worse, so nobody notices. Here the draft follows texts, with the target's states and tokens given.

    >>> new = specdec.generate(target, prompts).tokens  # prompts as token ids
    >>> texts = [[*prompt, *tokens.tolist()] for prompt, tokens in zip(prompts, new)]
    >>> print(specdec.drafters.check(target, drafter, texts))

    Args:
        target: the target.
        drafter: a drafter with a network on the target's states.
        texts: token ids of whole texts, prompts included, such as the target would write. A few hundred tokens tell readings
            apart; another one than that taken is proposed only if it leads by three standard errors.
        depth: how many drafted tokens are compared, at most as many as a block has; recursion shows from 2 on.
    """
    check_kind("target", target, PreTrainedModel, cure_for(target))
    check_kind("drafter", drafter, (FeatureDrafter, BlockDrafter), "pass one with a network on the target's states")
    config, net = target.config.get_text_config(), drafter.net
    others = list(net.readings(config.num_hidden_layers))
    blocks = [each.depth for each in (net, *(other for _, other in others)) if isinstance(each, BlockNet)]
    depth = min([as_int("depth", depth, 1), *blocks])  # what all of them draft
    tokens = _as_texts(texts, depth + 1 + getattr(net, "depth", 0), config.vocab_size)
    given = [text.to(target.device) for text in tokens]
    taken = _reading("as taken", net, target, given, depth)
    return Readings(taken, tuple(_reading(name, other, target, given, depth) for name, other in others))


def _as_texts(texts: Any, least: int, vocab: int) -> list[Tensor]:
    """Texts [1, t] int64 each, of more than `least` tokens."""
    ids = [as_ints(f"texts[{i}]", text, 0, vocab - 1) for i, text in enumerate(as_tuple("texts", texts, "texts"))]
    if not ids:
        raise ValueError("texts=(): give some, of a few hundred tokens together.")
    for i, text in enumerate(ids):
        if len(text) <= least:
            raise ValueError(f"texts[{i}] has {len(text)} tokens; give more than {least}, prompts included.")
    return [torch.tensor([text]) for text in ids]


@torch.no_grad()
def _reading(name: str, net: Any, model: PreTrainedModel, texts: Sequence[Tensor], depth: int) -> Reading:
    parts, overlaps, same = TargetParts.of(model, net), [], []
    for tokens in texts:
        states, hidden = read_texts(model, tokens, net.states)
        logits = logits_of(model, hidden)
        for d, found in enumerate(drafts_along(net, tokens, states, parts, depth).at(slice(None))):
            mine = net.over_target(found.logits[0].float(), logits.shape[2])
            theirs = logits[0, 1 + d : 1 + d + len(mine)].float()
            overlaps.append(torch.minimum(mine.softmax(-1), theirs.softmax(-1)).sum(-1).cpu())
            same.append((mine.argmax(-1) == theirs.argmax(-1)).float().cpu())
    by_depth = (torch.stack([torch.cat(part[d::depth]) for d in range(depth)], 1) for part in (overlaps, same))
    overlap, agreed = by_depth
    return Reading(name, overlap, agreed.mean(0))
