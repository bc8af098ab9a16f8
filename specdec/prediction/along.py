"""Texts that the target writes by itself, and what both models say along them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from specdec.arguments import as_request
from specdec.batch import Batch
from specdec.checks import as_int, check_callable, check_kind
from specdec.coins import Coins
from specdec.drafters.base import Drafter
from specdec.drafters.block import BlockNet
from specdec.drafters.states_drafter import StatesDrafter
from specdec.drafters.states_net import TargetParts
from specdec.drafters.teacher_forcing import drafts_along
from specdec.drafters.text_states import logits_of, read_texts
from specdec.generate import generate
from specdec.laws import Law
from specdec.loop import Decoding
from specdec.models.target import Target
from specdec.prediction.text import Text
from specdec.sampling import Sampling
from specdec.tree import DraftTree, TreeSpec
from specdec.trees import TreePolicy
from specdec.trees.base import Frontier, Grown, Growth, TreeRun


def texts(
    target: PreTrainedModel | Target,
    drafter: Callable[[TreePolicy], Drafter],
    prompt: Tensor,
    count: int = 8,
    *,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    depth: int = 8,
    **options: Any,
) -> list[Text]:
    """Let the target continue `prompt` by itself, and read both models' laws along its texts: one forward pass of each.

    Args:
        drafter: makes the drafter whose laws are read, given a tree policy: `partial(ModelDrafter, draft)`.
        count: how many texts; one is enough for greedy decoding, where all are the same.
        depth: of the deepest trees, for drafters whose laws depend on where a step began: those with a network on the target's
            states. A block bounds it.
        options: `max_new_tokens`, `stop_tokens`, as for `generate`.
    """
    check_callable("drafter", drafter, "pass a function from a tree policy to a drafter: partial(ModelDrafter, draft)")
    prompts = [prompt] * as_int("count", count, 1)
    written = generate(target, prompts, sampling=sampling, seed=seed, **options).tokens
    along = _Along(written)
    made = drafter(along)
    check_kind("what drafter(tree) returned", made, Drafter)
    if isinstance(made, StatesDrafter):
        model = target if isinstance(target, PreTrainedModel) else target.model
        if model is None:
            raise ValueError(f"{made} reads states of transformers models; the target is a {type(target).__name__}.")
        whole = [torch.cat([torch.as_tensor(prompt), new]) for new in written]
        return [read_along(model, made, text, len(prompt), sampling, depth) for text in whole]
    longest = along.tokens.shape[1]
    with Decoding(as_request(target, prompts, made, sampling=sampling, max_new_tokens=longest, trace="laws")) as run:
        run.step()
    record = run.trace.steps[0].record
    assert record is not None
    laws = record.target.tensor()
    return [
        Text(tokens.tolist(), laws[b, : len(tokens)], along.logits[b, : len(tokens)], along.sampling)
        for b, tokens in enumerate(written)
    ]


@torch.no_grad()
def read_along(
    model: PreTrainedModel, drafter: StatesDrafter, text: Tensor, prompt_length: int, sampling: Sampling, depth: int = 8
) -> Text:
    """A text of the target, and the laws that a network on its states drafts by along it, wherever steps begin.

    Args:
        model: the target.
        drafter: a drafter with such a network. Its tree is not used, nor a confidence at which it stops.
        text: [t] int64: token ids, those of the prompt included.
        prompt_length: of the prompt, at least 2: before that, such a network drafts from nothing.
        sampling: how the text was sampled.
        depth: of the deepest trees; a block bounds it.
    """
    net, first = drafter.net, as_int("prompt_length", prompt_length, 2, len(text) - 1)
    depth = min(as_int("depth", depth, 1), net.depth) if isinstance(net, BlockNet) else as_int("depth", depth, 1)
    tokens = text[None].to(model.device)
    states, hidden = read_texts(model, tokens, net.states)
    laws = sampling.probabilities(logits_of(model, hidden[:, first - 1 : -1])[0])
    longer = pad(tokens, (0, depth)), pad(states, (0, 0, 0, 0, 0, depth))  # what no law returned here depends on
    drafts = drafts_along(net, *longer, TargetParts.of(model, net), depth)
    found = [net.over_target(at.logits[0], laws.shape[-1]) for at in drafts.at(slice(first - 2, len(text) - 2))]
    by_place = torch.stack([pad(logits, (0, 0, d, 0))[: len(laws)] for d, logits in enumerate(found)])
    return Text(text[first:].tolist(), laws, by_place, sampling)


class _Along(TreePolicy):
    """Drafts given texts, to get the draft's logits along them. It serves one run only."""

    logits: Tensor  # [batch, place, vocab]: the draft's logits before each token
    sampling: Sampling

    def __init__(self, texts: list[Tensor]):
        tokens = pad_sequence(texts, batch_first=True)
        self.tokens = pad(tokens, (0, max(2 - tokens.shape[1], 0)))  # a draft has at least 2 nodes

    def spec(self, sampling: Sampling) -> TreeSpec:
        nodes = self.tokens.shape[1]
        return TreeSpec(frozenset({Law.POINT}), nodes, nodes - 1, 1)

    def start(self, batch: Batch, last: TreeRun | None = None) -> TreeRun:
        return _AlongRun(self, batch)


class _AlongRun(TreeRun):
    policy: _Along

    def grow(self, coins: Coins) -> Growth:
        batch, (rows, nodes) = self.batch, self.policy.tokens.shape
        tokens = torch.cat([batch.root[:, None], self.policy.tokens[:, :-1].to(batch.device)], 1)
        root = yield Frontier(tokens[:, :1], batch.chain(1))
        rest = yield Frontier(tokens[:, 1:], batch.chain(nodes))
        self.policy.logits, self.policy.sampling = torch.cat([root, rest], 1).cpu(), batch.sampling
        tree = DraftTree(tokens, batch.chain(nodes), torch.zeros_like(tokens, dtype=torch.uint8))
        return Grown(tree, torch.arange(nodes, device=tokens.device).expand(rows, -1))
