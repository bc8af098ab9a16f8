"""The certificate of batched code: the law that `Rule.decide_batch` emits at a node, found from its decisions alone.

A decision changes with a coin only at thresholds. So the law emitted after a root with drawn children is known once the
thresholds are: for every draft that can be drawn, the coin at which each child stops being accepted and, once all are
rejected, the coins at which the emitted token changes. They are found by bisection of the code that users run, in its own
arithmetic. The law is then compared with the exact law of the logits as they are given, in their dtype.

`specdec.testing.assert_fast_path(MyRule())` does this on laws that are hard for floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdec.batch import Batch
from specdec.coins import Coins, Purpose
from specdec.laws import Law, drafts, is_random
from specdec.rules import Rule
from specdec.sampling import Sampling
from specdec.target_law import LogitsLaw, TargetLaw
from specdec.tree import DraftTree, Topology, TreeSpec

# Most total variation between the emitted law and the target's, per token of the vocabulary: four roundings. Logits of 16 bits
# are computed with in 32.
ROUNDINGS = {torch.float64: 4 * 2.0**-53, torch.float32: 4 * 2.0**-24, torch.bfloat16: 4 * 2.0**-24}
RESOLUTION = 1e-8  # total variation that bisection leaves unknown at each child, and at the emission
NEVER = 1e-13  # drafts and turns less likely than this are left out
SURE = 1 - 2.0**-53  # the largest coin: a child that it does not reject is always accepted
LEAST_COIN = 2.0**-53  # the smallest coin above 0: it accepts at any chance that has not underflowed
_ROWS = 2**13  # rows that are decided at once


@dataclass(frozen=True, eq=False)
class Nodes:
    """Roots with children: cases of the certificate that are decided together.

    Args:
        names: what is hard about each.
        logits: [node, vocab]: the target's logits, in their own dtype.
        weights: [node, vocab]: the weights that children are drawn by, normalised or not, in the draft's own dtype.
        law: how children are drawn.
        width: how many children, at most.
        sampling: the settings that turn logits into laws.
    """

    names: tuple[str, ...]
    logits: Tensor
    weights: Tensor
    law: Law
    width: int
    sampling: Sampling

    @property
    def spec(self) -> TreeSpec:
        """The spec of these trees, for `Rule.check`."""
        return TreeSpec(frozenset({self.law}), 1 + self.width, 1, self.width, by_depth=True)

    @property
    def bound(self) -> float:
        """Largest total variation between the law that is emitted and the exact one."""
        return ROUNDINGS[self.logits.dtype] * self.logits.shape[1] + (1 + self.width) * RESOLUTION

    def exact(self) -> np.ndarray:
        """[node, vocab] float64: the target's laws, as exact as float64 is. Filters compare the logits themselves."""
        return np.stack([_exact(logits, self.sampling) for logits in self.logits.double().numpy()])

    def drafts(self) -> list[tuple[int, float, tuple[int, ...]]]:
        """(node, probability, tokens) of every draft that may be drawn; fewer tokens where the support ends."""
        return [
            (node, chance, tokens)
            for node, weights in enumerate(self.weights.double().numpy())
            for tokens, chance in drafts(self.law, weights, self.width).items()
            if chance > NEVER
        ]


def _exact(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """[vocab]: the law that `logits` [vocab] give."""
    temperature, top_k, top_p, min_p = sampling.filters
    ranked = np.sort(logits)[::-1]
    law = np.exp((logits - ranked[0]) / temperature)
    if top_k is not None:
        law[logits < ranked[:top_k][-1]] = 0
    if top_p is not None:
        mass = np.array([law[logits >= least].sum() for least in ranked])  # of all tokens at least as likely as each
        law[logits < ranked[np.argmax(mass >= top_p * law.sum())]] = 0
    if min_p is not None:
        law[logits < ranked[0] + temperature * np.log(min_p)] = 0
    return law / law.sum()


@dataclass(frozen=True)
class Thresholds:
    """Coins at which decisions change, all [threshold]: of a child when all before it are rejected, or of the emission."""

    draft: Tensor  # int64
    child: Tensor  # int64: the child that the coin decides on; the width stands for the emission
    coin: Tensor  # float64
    share: Tensor  # float64: how much of a node's law the coin decides

    def coins(self, width: int, by: float | Tensor = 0.0, others: float = SURE) -> tuple[Tensor, Tensor]:
        """Coins of the children [threshold, width] and of the emission [threshold] at the thresholds, plus `by`.

        All other children get the coin `others`, which rejects every child that is not nearly certain.
        """
        coin = (self.coin + by).clamp(LEAST_COIN, SURE)
        accept = torch.full((len(coin), width + 1), others, dtype=torch.float64)
        accept.scatter_(1, self.child[:, None], coin[:, None])
        return accept[:, :width], coin.where(self.child == width, 0)


def emitted_laws(rule: Rule, nodes: Nodes) -> tuple[Tensor, Thresholds]:
    """The laws [node, vocab] float64 that `rule.decide_batch` emits, and the thresholds, by bisection of its decisions."""
    decisions, laws = FastDecisions(rule, nodes), torch.zeros(nodes.logits.shape, dtype=torch.float64)
    owner, share, tokens, found = decisions.owner, decisions.chances.clone(), decisions.tokens, []
    index, vocab = torch.arange(len(owner)), nodes.logits.shape[1]
    # share: [draft]: the chance that a draft is drawn and all children before the current one are rejected
    for child in range(nodes.width):
        live = index[(tokens[:, child] >= 0) & (share > NEVER)]
        coin = bisect(
            lambda rows, coin, live=live, child=child: decisions.accepts(live[rows], child, coin), share[live]
        )
        found.append((live, torch.full_like(live, child), coin, share[live]))
        laws.index_put_((owner[live], tokens[live, child]), share[live] * coin, accumulate=True)
        share[live] *= 1 - coin
    last = index[share > NEVER]
    rows, most = (part.flatten() for part in torch.meshgrid(last, torch.arange(vocab - 1), indexing="ij"))
    coin = bisect(lambda at, coin: decisions.emits(rows[at], coin) <= most[at], share[rows])
    found.append((rows, torch.full_like(rows, nodes.width), coin, share[rows]))
    edges = pad(pad(coin.view(len(last), -1), (1, 0)), (0, 1), value=1.0)
    laws.index_add_(0, owner[last], share[last, None] * edges.diff())
    return laws, Thresholds(*(torch.cat(part) for part in zip(*found, strict=True)))


def bisect(holds: Callable[[Tensor, Tensor], Tensor], share: Tensor) -> Tensor:
    """[row] float64: the coin in [0, 1] up to which `holds` is true, to within RESOLUTION for all rows together.

    Args:
        holds: (rows [n] int64, coins [n] float64) -> [n] bool: true below some coin of each row, and false above it.
        share: [row] float64: how much of the law depends on the row's coin.
    """
    low, high = torch.zeros_like(share), torch.ones_like(share)
    width = RESOLUTION / (share * len(share))
    unsure = torch.arange(len(share))
    while len(unsure := unsure[(high - low > width)[unsure]]):
        for rows in unsure.split(_ROWS):
            middle = (low[rows] + high[rows]) / 2
            below = holds(rows, middle)
            low[rows], high[rows] = torch.where(below, middle, low[rows]), torch.where(below, high[rows], middle)
    return (low + high) / 2


class FastDecisions:
    """The decisions of batched code on every draft, with coins of our choice."""

    def __init__(self, rule: Rule, nodes: Nodes):
        drafts = nodes.drafts()
        self.rule, self.nodes = rule, nodes
        self.owner = torch.tensor([node for node, _, _ in drafts])  # [draft] int64: the node that it is drafted for
        self.chances = torch.tensor([chance for _, chance, _ in drafts], dtype=torch.float64)  # [draft]
        # [draft, width] int64, -1 where there is no such child
        self.tokens = torch.tensor([[*each, *[-1] * (nodes.width - len(each))] for _, _, each in drafts])

    def accepts(self, drafts: Tensor, child: int, coin: Tensor) -> Tensor:
        """[row] bool: whether `child` of these drafts is accepted with `coin` [row], and no other unless it is certain."""
        accept = torch.full((len(drafts), self.nodes.width), SURE, dtype=torch.float64)
        accept[:, child] = coin
        node, _ = self(drafts, accept, torch.zeros_like(coin))
        return node == child + 1

    def emits(self, drafts: Tensor, coin: Tensor) -> Tensor:
        """[row] int64: the token emitted with `coin` [row] when all children are rejected."""
        accept = torch.full((len(drafts), self.nodes.width), SURE, dtype=torch.float64)
        return self(drafts, accept, coin)[1]

    def __call__(self, drafts: Tensor, accept: Tensor, emit: Tensor) -> tuple[Tensor, Tensor]:
        """Decide drafts [row] with coins `accept` [row, width] and `emit` [row].

        Returns:
            [row] int64 each: the accepted node, 0 where no child is, and the token emitted after it.
        """
        made = self.rule.decide_batch(*self.inputs(drafts, accept, emit))
        return torch.where(made.accepted > 0, pad(made.path, (0, 1))[:, 1], 0), made.token

    def inputs(self, drafts: Tensor, accept: Tensor, emit: Tensor) -> tuple[DraftTree, TargetLaw, Coins]:
        """The arguments of the rule, for drafts [row] with coins `accept` [row, width] and `emit` [row]."""
        nodes, rows, width = self.nodes, len(drafts), self.nodes.width
        owner, children = self.owner[drafts], self.tokens[drafts]
        # As in `specdec.trees.draw`: where the top tokens are the whole support, nothing was sampled.
        whole = (children[:, -1:] < 0) & (not is_random(nodes.law, width - 1))
        root = torch.where(whole, Law.POINT, nodes.law)
        laws = torch.cat([root, torch.where(children >= 0, Law.POINT, Law.PADDING)], 1)
        topology = Topology(torch.tensor([-1] + [0] * width).expand(rows, -1), 1, width)
        probs = nodes.weights[owner][:, None] if is_random(nodes.law, 0) else None
        tree = DraftTree(pad(children.clamp(min=0), (1, 0)), topology, laws.to(torch.uint8), probs)
        batch = Batch(rows, 1, nodes.logits.shape[1], nodes.logits.device)
        batch.sampling = nodes.sampling
        law = LogitsLaw(nodes.logits[owner][:, None].expand(-1, 1 + width, -1), tree, batch)
        return tree, law, GivenCoins(pad(accept, (1, 0)), emit[:, None].expand(-1, 1 + width))


class GivenCoins(Coins):
    """Coins [row, node] of our choice."""

    def __init__(self, accept: Tensor, emit: Tensor):
        self.batch, self.nodes, self.device = *accept.shape, accept.device
        self._given = {Purpose.ACCEPT: accept, Purpose.EMIT: emit}

    def uniforms(self, purpose: Purpose) -> Tensor:
        return self._given[purpose]


class NaNWatch(TorchDispatchMode):
    """Notes in `found` whether an operation gave NaN, which must never come up, as it could decide something."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "empty" not in func.overloadpacket.__name__:  # memory that has not been written to may hold anything
            made = (t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point())
            self.found = self.found or any(bool(t.isnan().any()) for t in made)
        return out


def measured(rule: Rule, nodes: Nodes) -> list[dict[str, Any]]:
    """The certificate's figures, one dict for each node.

    `total_variation` between the emitted law and the exact one, its `bound`, and `nan`: whether an operation of the batched
    code gave NaN at coins where its decisions change.
    """
    rule.check(nodes.spec)
    laws, thresholds = emitted_laws(rule, nodes)
    distances = np.abs(laws.numpy() - nodes.exact()).sum(1) / 2
    with NaNWatch() as watch:
        FastDecisions(rule, nodes)(thresholds.draft, *thresholds.coins(nodes.width))
    return [
        {"case": name, "total_variation": float(distance), "bound": nodes.bound, "nan": watch.found}
        for name, distance in zip(nodes.names, distances, strict=True)
    ]
