"""The acceptance of trees and rules that were never run, from texts that the target wrote alone.

The only error is that the texts are a sample. The text of a lossless run has the target's law, whatever is drafted. So take a
text as given, and ask how a run would cut it into steps. Where a step begins, the rest of the text has the target's law again.
Let s_i be the chance, given the text, that a step beginning at place t accepts at least i drafted tokens. Then the step ends
after i + 1 tokens with chance s_i - s_(i+1), and

    b_0 = 1,  b_(t+i+1) += b_t (s_i - s_(i+1))

gives the chance b that a step begins at each place. These chances add up to the expected number of steps, without any sampling
of steps.

>>> found = texts(target, partial(ModelDrafter, draft), prompt, sampling=Sampling(1.0))
>>> acceptance_length(found, [-1, 0, 0, 1], TraversalVerification())  # of a tree that nobody ran

The s_i follow the text's next tokens down the tree. What the rules here do at a node depends only on which children failed, and
the law owed to a later child does not depend on their tokens. So let a node be entered, with the target's law p after it, and
let r be the chance that it or something below it is accepted:

- A child whose turn comes has token x with chance q(x), where q is its law. The child, or something below it, is accepted with
  chance r' = min(1, r p(x) / q(x)).
- It fails with chance 1 - sum min(r p, q). Then the next child has its turn, with the r and p of `residual`.
- Traversal verification enters the child with r'. On a chain it is block verification: s_i = min(s_(i-1), Q_i / P_i), where
  Q_i and P_i are the draft's and the target's probability of the next i tokens.
- Sibling rejection first accepts the child, with chance r', and then enters it with 1.

Divided by the target's own chance p(x) to write x, these are chances given the text, because the text goes on by the target's
law whatever was accepted. In greedy decoding s_i is 1 while the text is in the tree, and 0 from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from specdec.arguments import as_request
from specdec.batch import Batch
from specdec.checks import as_int, as_tuple, check_callable, check_kind
from specdec.coins import Coins
from specdec.drafters.base import Drafter
from specdec.drafters.block import BlockNet
from specdec.drafters.states_drafter import StatesDrafter
from specdec.drafters.states_net import TargetParts
from specdec.drafters.teacher_forcing import drafts_along, logits_of, read_texts
from specdec.generate import generate
from specdec.laws import Law, excludes_elders
from specdec.loop import Decoding
from specdec.models.target import Target
from specdec.rules import BlockVerification, Rule, SiblingRejection, TraversalVerification
from specdec.rules.residual import residual
from specdec.sampling import Sampling
from specdec.tree import DraftTree, RowTree, Topology, TreeSpec
from specdec.trees import Static, TreePolicy
from specdec.trees.base import Frontier, Grown, Growth, TreeRun
from specdec.trees.draw import draw

# for each rule, whether it enters a child only after accepting it
_ACCEPTING: dict[type[Rule], bool] = {SiblingRejection: True, BlockVerification: False, TraversalVerification: False}


@dataclass(frozen=True, eq=False)
class Text:
    """A text that the target wrote, and the laws before each of its tokens.

    Args:
        tokens: the new tokens.
        target: [place, vocab]: the target's laws.
        draft: [place, vocab]: the draft's logits; [depth, place, vocab] if they depend on how many drafts came before.
        sampling: how the text was sampled.
    """

    tokens: list[int]
    target: Tensor
    draft: Tensor
    sampling: Sampling

    def starts(self, parents: Sequence[int], rule: Rule, law: Law = Law.SAMPLED_THEN_TOP) -> np.ndarray:
        """[place]: the chance, given the text, that a step begins there in a run that drafts such trees.

        Args:
            parents: of the trees' nodes, as for `specdec.trees.Static`.
            rule: sibling rejection, block or traversal verification.
            law: how siblings are drawn; WITHOUT_REPLACEMENT for chains only.
        """
        _check(parents, rule, law, self.sampling)
        self._check_depth(parents)
        children = [[child for child, parent in enumerate(parents) if parent == node] for node in range(len(parents))]
        forest = cache(partial(self._forest, law))
        laws, accepting = self.target.double().numpy(force=True), _ACCEPTING[type(rule)]
        places = len(self.tokens)
        begins = np.zeros(places + len(parents))
        begins[0] = 1
        for start in range(places):
            survival = [1.0]
            # (node, chance that it is drafted and entered, chance that it or something below is then accepted)
            states = [(0, 1.0, 1.0)]
            for place in range(start, places):
                states = [
                    (children[node][slot], weight * chance, within)
                    for node, weight, reach in states
                    if (width := len(children[node]))
                    for slot, chance, within in self._entered(
                        place, laws[place], reach, forest(width, place - start), width, accepting
                    )
                ]
                if not states:
                    break
                survival.append(sum(weight * reach for _, weight, reach in states))
            begins[start + 1 : start + 1 + len(survival)] -= begins[start] * np.diff([*survival, 0])
        return begins[:places]

    def _entered(
        self, place: int, p: np.ndarray, reach: float, forest: RowTree, width: int, accepting: bool
    ) -> Iterator[tuple[int, float, float]]:
        """(slot, chance to be drafted and entered, chance to be then accepted) of children with the text's token."""
        x, turn = self.tokens[place], 1.0
        own = p[x]
        for child, q in forest.draws(place, len(p)):
            taken = np.minimum(reach * p, q)
            if taken[x] > 0:
                slot, entered = (child - len(self.tokens)) % width, taken[x] if accepting else q[x]
                yield slot, turn * entered / own, taken[x] / entered
            turn *= 1 - taken.sum()
            reach, p = residual(reach, p, q)

    def _check_depth(self, parents: Sequence[int]) -> None:
        """Raise ValueError if the tree is deeper than laws are known."""
        deepest = [0]
        for parent in parents[1:]:
            deepest.append(deepest[parent] + 1)
        if self.draft.dim() == 3 and max(deepest) > len(self.draft):
            raise ValueError(
                f"parents={parents}: the tree is {max(deepest)} deep, and the draft's laws are known to depth "
                f"{len(self.draft)}; use a tree no deeper, or texts(..., depth={max(deepest)})."
            )

    def _forest(self, law: Law, width: int, depth: int) -> RowTree:
        """One row with a root for every place, numbered like it, and the children drawn at each; they follow in order."""
        places = len(self.tokens)
        coins = Coins(0, 1, places * (1 + width))
        logits = self.draft[depth] if self.draft.dim() == 3 else self.draft
        drawn = draw(logits[None], width, law, self.sampling, coins, places)
        parents = torch.cat([torch.full((places,), -1), torch.arange(places).repeat_interleave(width)])
        leaves = torch.zeros_like(drawn.tokens, dtype=torch.uint8)
        if drawn.exists is not None:
            leaves.masked_fill_(~drawn.exists, Law.PADDING)
        tokens = torch.cat([drawn.tokens.new_zeros(1, places), drawn.tokens], 1)
        topology, laws = Topology(parents[None], 1, width), torch.cat([drawn.laws, leaves], 1)
        return DraftTree(tokens, topology, laws, drawn.draft_probs).row(0)


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


def acceptance_length(
    texts: Sequence[Text], parents: Sequence[int], rule: Rule = SiblingRejection(), law: Law = Law.SAMPLED_THEN_TOP
) -> float:
    """Tokens per expected step, as in `Trace.summary`; arguments as for `Text.starts`."""
    texts = as_tuple("texts", texts, "texts, as from specdec.prediction.texts")
    if not texts:
        raise ValueError("texts=[]: must be at least one.")
    for i, text in enumerate(texts):
        check_kind(f"texts[{i}]", text, Text)
    return sum(len(text.tokens) for text in texts) / sum(text.starts(parents, rule, law).sum() for text in texts)


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


def _check(parents: Sequence[int], rule: Rule, law: Law, sampling: Sampling) -> None:
    check_kind("rule", rule, Rule)
    spec = Static(parents, law).spec(sampling)
    if type(rule) not in _ACCEPTING:
        names = ", ".join(known.__name__ for known in _ACCEPTING)
        raise ValueError(f"{type(rule).__name__}: acceptance can be predicted for {names} only; run it instead.")
    if spec.width > 1 and any(excludes_elders(each) for each in spec.laws):
        raise ValueError(
            f"law={law.name}: the law owed after a child failed depends on its token, which is not in the text; "
            "use SAMPLED_THEN_TOP, IID or POINT, or run it."
        )
    rule.check(spec)
