"""Dynamic trees (EAGLE-2, arXiv:2406.16858): a beam per depth by the draft's confidence, then the best nodes of all.

With a threshold, growth ends where the next node would add too little to the expected acceptance length, as in OPT-Tree
(arXiv:2406.17276). Deviation: OPT-Tree bounds what a whole depth adds; here the bound is on each node, so that a row's tree
depends on no other row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import as_float, put, put_size
from specdec.coins import Coins
from specdec.laws import Law
from specdec.sampling import Sampling
from specdec.tree import DraftTree, Topology, TreeSpec
from specdec.trees.base import Frontier, Grown, Growth, TreePolicy, TreeRun


@dataclass(frozen=True)
class Dynamic(TreePolicy):
    """The `nodes - 1` most probable of all paths that a beam of `width` per depth meets; POINT children.

    A node's confidence is the product of the draft's probabilities along its path (at the sampling's temperature, or at 1 if
    that is 0). Nothing is sampled, so nodes may be chosen after the fact.

    Args:
        nodes: size of the tree, the root included.
        depth: longest path.
        width: the beam: how many nodes are continued per depth, and how many children are considered for each.
        threshold: least confidence of a node, which the draft expects it to add to the acceptance length. Above 0 trees
            differ in size from step to step, and the host waits once per depth to learn whether growth goes on.
    """

    nodes: int = 25
    depth: int = 5
    width: int = 4
    threshold: float = 0.0

    def __post_init__(self) -> None:
        put_size(self)
        put(self, threshold=as_float("threshold", self.threshold, "[0, 1)", "a confidence is at least 0 and below 1"))

    @property
    def capturable(self) -> bool:
        return self.threshold == 0

    def spec(self, sampling: Sampling) -> TreeSpec:
        asked = 1 + self.width * (self.depth - 1)  # the beams of all depths, which may be more than `nodes`
        return TreeSpec(frozenset({Law.POINT}), max(self.nodes, asked), self.depth, self.width, by_depth=True)

    def start(self, batch: Batch, last: TreeRun | None = None) -> TreeRun:
        return last if last and last.serves(self, batch) else _DynamicRun(self, batch)


class _DynamicRun(TreeRun):
    policy: Dynamic

    def grow(self, coins: Coins) -> Growth:
        policy, texts = self.policy, self.batch
        batch, device, deepest = len(texts), texts.device, min(policy.depth, texts.max_depth)
        tokens = texts.root[:, None]  # [batch, beam]
        score = tokens.new_zeros((batch, 1), dtype=torch.float64)  # log-probability of each path of the beam
        order = torch.zeros_like(tokens)  # [batch, beam]: the place of each node among those asked for
        origin = torch.full_like(tokens, -1)  # [batch, beam]: the index of each node among the candidates
        asked, found = Topology(tokens.new_full((batch, 1), -1), 0, 0), _Candidates(batch, device)
        for depth in range(1, deepest + 1):
            logits = yield Frontier(tokens, asked)
            logp = (logits.double() / (texts.sampling.temperature or 1.0)).log_softmax(-1)
            best = logp.topk(min(policy.width, logp.shape[-1]), -1)
            score = (score[..., None] + best.values).flatten(1)
            beyond = texts.left[:, None] <= depth  # no row draws beyond its budget
            score = torch.where(beyond | (score.exp() < policy.threshold), -torch.inf, score)
            repeats = best.indices.shape[-1]
            index = found.add(best.indices.flatten(1), score, origin.repeat_interleave(repeats, 1))
            beam = score.topk(min(policy.width, score.shape[1]), -1)
            tokens, score = best.indices.flatten(1).gather(1, beam.indices), beam.values
            parent = order.repeat_interleave(repeats, 1).gather(1, beam.indices)
            origin = index.gather(1, beam.indices)
            start = asked.parents.shape[1]
            order = torch.arange(start, start + tokens.shape[1], device=device).expand(batch, -1)
            asked = Topology(torch.cat([asked.parents, parent], 1), depth, policy.width)
            if policy.threshold and not bool((score > -torch.inf).any()):
                break
            if depth < deepest:
                found.note_order(origin, order)
        return found.best(policy.nodes - 1, texts.root, policy.width, shrinks=policy.threshold > 0)


class _Candidates:
    """All paths that the beam has met. A candidate's parent comes before it and is never less probable."""

    def __init__(self, batch: int, device: torch.device):
        self.tokens = torch.zeros((batch, 0), dtype=torch.int64, device=device)
        self.parents, self.asked, self.depths = self.tokens, self.tokens, 0
        self.scores = self.tokens.double()

    def add(self, tokens: Tensor, scores: Tensor, parents: Tensor) -> Tensor:
        """Append [batch, n] candidates with parents given by candidate index (-1: the root); returns their indices."""
        start = self.tokens.shape[1]
        self.tokens, self.scores = torch.cat([self.tokens, tokens], 1), torch.cat([self.scores, scores], 1)
        self.parents = torch.cat([self.parents, parents], 1)
        self.asked = torch.cat([self.asked, torch.full_like(tokens, -1)], 1)
        self.depths += 1
        return torch.arange(start, start + tokens.shape[1], device=tokens.device).expand(len(tokens), -1)

    def note_order(self, index: Tensor, order: Tensor) -> None:
        """Note the places `order` [batch, n] of the candidates `index` [batch, n] among the nodes asked for."""
        self.asked.scatter_(1, index, order)

    def best(self, count: int, root: Tensor, width: int, shrinks: bool) -> Grown:
        """The tree of the `count` most probable candidates. If it `shrinks`, it has only as many as some row can use."""
        end = self.tokens.shape[1]
        # A stable sort prefers the earlier of equals, so that no child is chosen without its parent.
        ranked = self.scores.sort(dim=1, descending=True, stable=True)
        possible = ranked.values[:, :count] > -torch.inf
        count = int(possible.sum(1).amax()) if shrinks else min(count, end)
        chosen = torch.where(possible, ranked.indices[:, : possible.shape[1]], end)[:, :count].sort(1).values
        exists, index = chosen < end, chosen.clamp(max=max(end - 1, 0))  # the impossible come last
        parents = self.parents.gather(1, index)
        place = torch.searchsorted(chosen.contiguous(), parents.contiguous()) + 1  # node 0 is the root
        place = torch.where(exists & (parents >= 0), place, 0)
        root_first = torch.nn.functional.pad
        tokens = torch.cat([root[:, None], self.tokens.gather(1, index)], 1)
        topology = Topology(root_first(place, (1, 0), value=-1), self.depths, width)
        laws = root_first(torch.where(exists, Law.POINT, Law.PADDING), (1, 0), value=Law.POINT)
        tree = DraftTree(tokens, topology, laws.to(torch.uint8))
        return Grown(tree, root_first(self.asked.gather(1, index), (1, 0)))
