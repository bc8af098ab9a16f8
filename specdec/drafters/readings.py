"""Whether a draft is read as it was trained. Files do not say which layers they mean, and one read wrongly still drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_int, check_kind
from specdec.drafters.block import BlockDrafter
from specdec.drafters.feature import FeatureDrafter
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.drafters.teacher_forcing import drafts_along, read_texts


@dataclass(frozen=True)
class Reading:
    """How well a draft agrees with its target if it is read in one way.

    Args:
        name: what differs from the way that was taken; "as taken".
        overlap: by depth, from 1 on: the mean of sum min(p, q) along the texts, the rate at which one draft is accepted at
            temperature 1.
        same: by depth: how often both find the same token most likely.
    """

    name: str
    overlap: tuple[float, ...]
    same: tuple[float, ...]

    @property
    def accepted(self) -> float:
        """Expected accepted tokens of a chain, if its depths were independent."""
        return sum(torch.tensor(self.overlap).cumprod(0).tolist())


@dataclass(frozen=True)
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
        return max((self.taken, *self.others), key=lambda reading: reading.accepted)

    def __str__(self) -> str:
        rows = [self.taken, *self.others]
        wide = max(len(reading.name) for reading in rows)
        depths = range(1, 1 + len(self.taken.overlap))
        lines = [f"{'reading':{wide}}  {'  '.join(f'depth {d}: 1 - TV, same top' for d in depths)}"]
        for reading in rows:
            cells = (f"{o:13.3f} {s:10.3f}   " for o, s in zip(reading.overlap, reading.same, strict=True))
            lines.append(
                f"{reading.name:{wide}}  {'  '.join(cells)}{'<- best' if reading is self.best else ''}".rstrip()
            )
        return "\n".join(lines)


def check(
    target: PreTrainedModel, drafter: FeatureDrafter | BlockDrafter, texts: Sequence[Tensor], depth: int = 2
) -> Readings:
    """Compare how a draft is read with the ways in which its file may have been meant.

    Layer ids mean four things in five code bases, and flags have opposite defaults. A draft that is read one layer off still
    drafts, only worse, so nobody notices. Here the draft follows texts that the target would write (its own, or a page of
    what it was trained on), with the target's states and tokens given; a few hundred tokens tell readings apart.

    >>> print(specdec.drafters.check(target, drafter, texts))

    Args:
        target: the target.
        drafter: a drafter on the target's states.
        texts: 1-D int64 tensors, each of more than `depth` + 1 tokens.
        depth: how many drafted tokens are compared; recursion shows from 2 on.
    """
    kinds = FeatureDrafter, BlockDrafter
    check_kind("drafter", drafter, kinds, "pass one that reads the target's states, such as an Eagle3Drafter")
    depth = as_int("depth", depth, 1)
    for i, text in enumerate(texts):
        if len(text) < depth + 2:
            raise ValueError(f"texts[{i}] has {len(text)} tokens; give at least {depth + 2}, for drafts of {depth}.")
    net, layers = drafter.net, target.config.get_text_config().num_hidden_layers
    taken = _reading("as taken", net, target, texts, depth)
    others = (_reading(name, other, target, texts, depth) for name, other in net.readings(layers))
    return Readings(taken, tuple(others))


@torch.no_grad()
def _reading(name: str, net: StatesNet, model: PreTrainedModel, texts: Sequence[Tensor], depth: int) -> Reading:
    parts, places = TargetParts.of(model), 0
    overlap, same = torch.zeros(2, depth, dtype=torch.float64)
    for text in texts:
        tokens = text[None].to(model.device)
        states, logits = read_texts(model, tokens, net.states)
        _, drafted = drafts_along(net, tokens, states, parts, depth)
        for d, found in enumerate(drafted):
            mine = net.over_target(found[0].float(), logits.shape[2])
            theirs = logits[0, 1 + d : 1 + d + len(mine)].float()
            overlap[d] += torch.minimum(mine.softmax(-1), theirs.softmax(-1)).sum().double().cpu()
            same[d] += (mine.argmax(-1) == theirs.argmax(-1)).sum().cpu()
        places += drafted[0].shape[1]
    return Reading(name, tuple((overlap / places).tolist()), tuple((same / places).tolist()))
