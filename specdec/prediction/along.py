"""Texts that the target writes by itself, and what both models say along them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from specdec.arguments import as_request, as_target
from specdec.batch import Batch
from specdec.checks import as_int, check_kind
from specdec.coins import Coins
from specdec.drafters.block import BlockNet
from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.drafters.states_drafter import StatesDrafter
from specdec.drafters.states_net import TargetParts
from specdec.drafters.teacher_forcing import drafts_along
from specdec.drafters.text_states import logits_of, read_texts
from specdec.drafters.tree_drafter import TreeDrafter
from specdec.generate import generate
from specdec.laws import Law
from specdec.loop import Decoding
from specdec.models.causal_lm import CausalLM
from specdec.models.routing import passing_through
from specdec.models.target import Target
from specdec.prediction.text import NotForetold, Text
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Topology, TreeSpec, chain
from specdec.trees import TreePolicy
from specdec.trees.base import Frontier, Grown, Growth, TreeRun


def texts(
    target: PreTrainedModel | Target,
    drafter: TreeDrafter,
    prompt: Tensor,
    count: int = 8,
    *,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    depth: int = 8,
    **options: Any,
) -> list[Text]:
    """Let the target continue `prompt` by itself, and read both models' laws along its texts.

    Args:
        drafter: whose laws are read; its tree is not used.
        count: how many texts; one is enough for greedy decoding, where all are the same.
        depth: as for `read_along`.
        options: `max_new_tokens`, `stop_tokens`, as for `generate`.
    """
    check_kind("drafter", drafter, TreeDrafter, "pass a drafter that grows trees, such as ModelDrafter(draft)")
    prompts = [prompt] * as_int("count", count, 1)
    written = generate(target, prompts, sampling=sampling, seed=seed, **options).tokens
    whole = [torch.cat([torch.as_tensor(prompt), new]) for new in written]
    return [read_along(target, drafter, text, len(prompt), sampling, depth) for text in whole]


def read_along(
    target: PreTrainedModel | Target,
    drafter: TreeDrafter,
    text: Tensor,
    prompt_length: int,
    sampling: Sampling,
    depth: int = 8,
) -> Text:
    """A text of the target, and the laws that a drafter drafts by along it, wherever steps begin.

    Args:
        target: who wrote the text.
        drafter: whose laws are read. Its tree is not used, nor a confidence at which it stops.
        text: [t] int64: token ids, those of the prompt included.
        prompt_length: of the prompt; at least 2 for drafters that use the target's states or layers: before that, such a
            network drafts from nothing.
        sampling: how the text was sampled.
        depth: of the deepest trees, for drafters whose laws depend on where a step began: those that use the target's states
            or layers. A block bounds it.

    Raises:
        NotForetold: logits processors, with a drafter that uses the target's states or layers.
    """
    check_kind("drafter", drafter, TreeDrafter, "pass a drafter that grows trees, such as ModelDrafter(draft)")
    inside = isinstance(drafter, (StatesDrafter, LayerSkipDrafter))
    first = as_int("prompt_length", prompt_length, 2 if inside else 1, len(text) - 1)
    depth = as_int("depth", depth, 1)
    if not inside:
        return _of_nodes(target, drafter, text, first, sampling)
    model = as_target(target).model
    if model is None:
        raise ValueError(f"{drafter} uses what is in transformers models; the target is a {type(target).__name__}.")
    request = as_request(target, [text[:first]], sampling=sampling, max_new_tokens=len(text) - first)
    if request.texts[0].processors:
        raise NotForetold(
            f"Logits processors change the laws of {drafter} from node to node of a tree; run it instead."
        )
    sampling = request.sampling
    if isinstance(drafter, LayerSkipDrafter):
        return _of_layers(model, drafter, text, first, sampling, depth)
    return _of_states(model, drafter, text, first, sampling, depth)


@torch.no_grad()
def _of_states(
    model: PreTrainedModel, drafter: StatesDrafter, text: Tensor, first: int, sampling: Sampling, depth: int
) -> Text:
    net = drafter.net
    depth = min(depth, net.depth) if isinstance(net, BlockNet) else depth
    tokens = text[None].to(model.device)
    states, hidden = read_texts(model, tokens, net.states)
    laws = sampling.probabilities(logits_of(model, hidden[:, first - 1 : -1])[0])
    longer = pad(tokens, (0, depth)), pad(states, (0, 0, 0, 0, 0, depth))  # what no law returned here depends on
    drafts = drafts_along(net, *longer, TargetParts.of(model, net), depth)
    found = [net.over_target(at.logits[0], laws.shape[-1]) for at in drafts.at(slice(first - 2, len(text) - 2))]
    return Text(text[first:].tolist(), laws, _by_place(found), sampling)


@torch.inference_mode()
def _of_layers(
    model: PreTrainedModel, drafter: LayerSkipDrafter, text: Tensor, first: int, sampling: Sampling, depth: int
) -> Text:
    """Two passes over one row: all layers read the text, and those that are kept read a chain from each of its places.

    The nodes of a chain see the text before its root as the whole model wrote it, and each other through the kept layers.
    """
    lm, skipped = CausalLM(model), drafter.skipped(model)
    tokens = text[None].to(lm.device)
    written = tokens[:, first - 2 : -1]  # nodes; the root of the step that begins at a place is node place + 1
    places = written.shape[1] - 1
    cached = lm.start(1, tokens.shape[1] + (depth + 1) * places + 1, (depth + 1) * places + 1)
    cached.read_anew(tokens, {0: first - 2})
    whole = cached.forward(written, chain(1, places + 1, lm.device), first - 2)
    laws = sampling.probabilities(whole[0, 1:])
    above = torch.arange(depth * places, device=lm.device)  # level after level: parents are one level before
    parents = torch.cat([torch.arange(-1, places, device=lm.device), torch.where(above < places, above, above + 1)])
    index = above % places + 1 + above // places
    nodes = written.gather(1, index.clamp(max=places)[None])  # beyond the text anything: no law is read there
    with passing_through(skipped):
        logits = cached.forward(nodes, Topology(parents[None], places + depth, None), first - 2)
    return Text(text[first:].tolist(), laws, _by_place([*logits[0].split(places)]), sampling)


def _by_place(found: list[Tensor]) -> Tensor:
    """[depth, place, vocab]: logits by the place of the token that they are of, from those by where a step began."""
    return torch.stack([pad(logits, (0, 0, d, 0))[: len(logits)] for d, logits in enumerate(found)])


def _of_nodes(
    target: PreTrainedModel | Target, drafter: TreeDrafter, text: Tensor, first: int, sampling: Sampling
) -> Text:
    """One step of both models, whose tree is the rest of the text."""
    new, along = text[first:], _Along(text[first:])
    options = {"sampling": sampling, "max_new_tokens": along.tokens.shape[1], "trace": "laws"}
    with Decoding(as_request(target, [text[:first]], drafter.with_tree(along), **options)) as run:
        run.step()
    record = run.trace.steps[0].record
    assert record is not None
    return Text(new.tolist(), record.target.tensor()[0, : len(new)], along.logits[: len(new)], along.sampling)


class _Along(TreePolicy):
    """Drafts a given text, to get the draft's logits along it. It serves one run only."""

    logits: Tensor  # [place, vocab]: the draft's logits before each token
    sampling: Sampling

    def __init__(self, new: Tensor):
        self.tokens = pad(new[None], (0, max(2 - len(new), 0)))  # a draft has at least 2 nodes

    def spec(self, sampling: Sampling) -> TreeSpec:
        nodes = self.tokens.shape[1]
        return TreeSpec(frozenset({Law.POINT}), nodes, nodes - 1, 1)

    def start(self, batch: Batch, last: TreeRun | None = None) -> TreeRun:
        return _AlongRun(self, batch)


class _AlongRun(TreeRun):
    policy: _Along

    def grow(self, coins: Coins) -> Growth:
        batch, nodes = self.batch, self.policy.tokens.shape[1]
        tokens = torch.cat([batch.root[:, None], self.policy.tokens[:, :-1].to(batch.device)], 1)
        root = yield Frontier(tokens[:, :1], batch.chain(1))
        rest = yield Frontier(tokens[:, 1:], batch.chain(nodes))
        self.policy.logits, self.policy.sampling = torch.cat([root, rest], 1)[0].cpu(), batch.sampling
        tree = DraftTree(tokens, batch.chain(nodes), torch.zeros_like(tokens, dtype=torch.uint8))
        return Grown(tree, torch.arange(nodes, device=tokens.device)[None])
