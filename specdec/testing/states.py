"""Whether networks on the target's states are served as they are trained: their laws, by plain passes over whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from specdec.drafters.block import BlockDrafter
from specdec.drafters.feature import FeatureDrafter
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.drafters.teacher_forcing import drafts_along
from specdec.drafters.text_states import read_texts
from specdec.generate import generate
from specdec.laws import Law
from specdec.sampling import Sampling
from specdec.testing.noting import Noting


def assert_served_as_trained(
    drafter: FeatureDrafter | BlockDrafter,
    target: PreTrainedModel,
    texts: Sequence[Tensor],
    sampling: Sampling,
    new_tokens: int,
    tolerance: float,
) -> None:
    """Raise AssertionError unless every law of every tree is that of training, in ragged rows that change their texts."""
    noting = Noting(drafter)
    options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": new_tokens, "stop_tokens": (), "batch_size": 2}
    generate(target, [*texts, *texts], noting, **options)
    for draft in noting.drafts:
        laws = () if draft.probs is None or len(draft.text) == 1 else draft.probs
        for node, found in enumerate(laws):
            if draft.laws[node] in (Law.PADDING, Law.POINT):
                continue
            logits = drafted_logits(drafter.net, target, draft.text, draft.path(node))
            expected = sampling.probabilities(drafter.net.over_target(logits, len(found)))
            distance = float((found - expected).abs().sum() / 2)
            assert distance <= tolerance, (
                f"{drafter}: after {list(draft.text)} and the drafts {draft.path(node)} it drafts by a law that is "
                f"{distance:.3g} from the one it is trained by."
            )


@torch.no_grad()
def drafted_logits(net: StatesNet, model: PreTrainedModel, text: Sequence[int], path: Sequence[int]) -> Tensor:
    """[vocab]: the logits of the network after a path of drafts below a text of at least two tokens.

    The text is read in one plain pass of the target and one of the network, without caches, trees or batches.
    """
    tokens, root = torch.tensor([[*text, *path]], device=model.device), len(text) - 1
    states, parts = read_texts(model, tokens, net.states)[0], TargetParts.of(model, net)
    # a token that no law returned here depends on
    tokens, states = pad(tokens, (0, 1)), pad(states, (0, 0, 0, 0, 0, 1))
    drafts = drafts_along(net, tokens, states, parts, len(path) + 1)
    return drafts.at(slice(root - 1, root))[-1].logits[0, 0]
