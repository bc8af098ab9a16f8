"""Adaptive trees: every step drafts as much as pays, and nothing when nothing does.

A level or a node is worth drafting when the tokens it is expected to add are worth its time at the speed that decoding has
anyway (Dinkelbach's rule for the largest ratio of expected tokens to time; new here in this form). What is expected comes from
the draft's confidence and from what became of earlier drafts, `specdec.trees.economy` says how.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.coins import Coins
from specdec.drafters.drafter import Acceptance, Context
from specdec.sampling import Sampling
from specdec.theory import Costs
from specdec.tree import DraftTree, Law, Topology, TreeSpec, root_only
from specdec.trees.economy import Economy
from specdec.trees.policy import Children, Frontier, Grown, Growth, TreePolicy, draw, drawn_laws

_LAGGARDS = 8  # a row with a tenth less time to go counts half
_USUAL = 16  # steps of one token that the pace of a row begins with
_OVERLAP = 0.5  # of a flat draft law with the target's, on the demo pair at temperature 1; outcomes correct it


@dataclass(eq=False)
class Adaptive(TreePolicy):
    """Depth and widths chosen level by level from measured times and acceptance; no draft where none pays.

    Every level continues the most promising of the newest nodes and gives each the same number of children. Both numbers
    are chosen before the level is drawn, from what was drawn above it and from earlier steps, and nothing drawn is dropped:
    so it is lossless. They are chosen for the batch as a whole, so that a row's text depends on the other rows, and unless
    `costs` are given on the clock, so that a seed does not repeat a run: its law stays the target's all the same.

    Sampled children are drawn as SAMPLED_THEN_TOP, a single one from the draft's law. A draft that is never accepted costs
    about 2 tokens, and 1 % of the steps: see `specdec.trees.economy.Rate`. What is learned is forgotten at the end of a run;
    one policy serves one run at a time.

    Args:
        nodes: most nodes of a tree, the root included.
        depth: longest path.
        width: most children of a node, and most nodes continued per level; 1 for chains.
        costs: measured times, as from `specdec.theory.measure_costs`; None: the run's own steps are timed.
    """

    nodes: int = 24
    depth: int = 8
    width: int = 3
    costs: Costs | None = None
    _economy: Economy | None = field(default=None, init=False, repr=False)
    _context: Context | None = field(default=None, init=False, repr=False)
    _expected: Tensor | None = field(default=None, init=False, repr=False)
    _grown: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.nodes < 2 or self.depth < 1 or self.width < 1:
            raise ValueError(f"{self}: need nodes >= 2, depth >= 1 and width >= 1.")
        if self.costs is not None and self.costs.verify.nodes[-1] < self.nodes:
            raise ValueError(
                f"nodes={self.nodes}, but costs.verify was measured up to {self.costs.verify.nodes[-1]}: measure more "
                "(measure_costs(nodes=...)) or lower `nodes`."
            )

    def spec(self, sampling: Sampling) -> TreeSpec:
        laws = drawn_laws(Law.IID, sampling)
        if self.width > 1:
            laws |= drawn_laws(Law.SAMPLED_THEN_TOP, sampling)
        return TreeSpec(laws, self.nodes, self.depth, self.width, by_depth=True, by_row=False)

    def grow(self, context: Context, coins: Coins) -> Growth:
        if context is not self._context:  # a new run
            self._context, self._begun, self._steps = context, context.lengths.clone(), 0
            self._economy = Economy(self.nodes, self.width, self.costs)
        economy, self._expected, self._grown = self._economy, None, True
        assert economy is not None
        self._steps += 1
        economy.begin(min(self.depth, context.max_depth))
        going = economy.continues()
        if not going:
            economy.finish()
            return Grown(root_only(context.root), torch.full_like(context.root, -1)[:, None])
        tree, weights = _Growing(context, self.nodes), self._weights(context)
        # [batch, frontier]: the chance of each node of the frontier to be accepted, times the row's weight
        reach = weights * tree.useful()
        while going:
            logits = yield tree.frontier()
            families = _families(logits, min(self.width, economy.room, logits.shape[-1]), context.sampling)
            count = economy.children(*_on_host(reach, families))
            if count == 0:
                break
            law = Law.SAMPLED_THEN_TOP if count > 1 else Law.IID
            drawn = draw(logits, count, law, context.sampling, coins, tree.nodes)
            chances = _chances(logits, drawn.tokens, families[..., :count], context.sampling)
            exists = tree.add(drawn, families[..., count - 1] * tree.useful())
            chances = (economy.calibration * chances).clamp(max=1)
            reach = (reach[..., None] * chances).flatten(1) * exists * tree.useful()
            best = reach.topk(min(self.width, reach.shape[1]), -1)
            count = economy.frontier(best.values.sum(0).tolist())
            reach, going = best.values[:, :count], economy.continues()
            tree.turn_to(best.indices[:, :count])
        economy.finish()
        self._expected = torch.cat([weights, tree.expected], 1)
        return tree.grown(self.width)

    def _weights(self, context: Context) -> Tensor:
        """[batch, 1] float64, together 1: a batch ends with its last row, so rows with most time to go count most."""
        pace = (context.lengths - self._begun + _USUAL) / (self._steps - 1 + _USUAL)  # tokens per step
        left = (context.row_depths + 1) / pace
        weights = (left / left.amax()).double()[:, None] ** _LAGGARDS
        return weights / weights.sum()

    def commit(self, acceptance: Acceptance) -> None:
        if not self._grown or self._economy is None:
            return
        self._grown = False
        if self._expected is None:  # nothing was drafted
            return self._economy.learn([])
        chosen = torch.nn.functional.pad(acceptance.path + 1, (1, 0))  # the weight, and the accepted nodes' families
        rows = torch.cat([self._expected.gather(1, chosen), acceptance.keep[:, None]], 1).tolist()
        rows = [row for row, stopped in zip(rows, acceptance.stopped, strict=True) if not stopped]
        self._economy.learn([(weight, path[: int(keep)]) for weight, *path, keep in rows])


def _on_host(reach: Tensor, families: Tensor) -> tuple[float, list[float]]:
    """Summed over nodes and rows: reach, and reach times each family's chance."""
    total, *sums = torch.cat([reach[..., None], reach[..., None] * families], -1).sum((0, 1)).tolist()
    return total, sums


def _families(logits: Tensor, most: int, sampling: Sampling) -> Tensor:
    """[batch, count, most]: how often one of the first 1, 2, ... children of each node is accepted, by the draft's confidence.

    Greedy, the target's token is among the draft's top k about as often as the square root of their mass (fits the demo pair
    to 0.05). Sampled, the top k - 1 have their mass of the target's law, and the rest overlaps by half.
    """
    logits = logits.float() / (sampling.temperature or 1.0)
    mass = (logits.topk(most, -1).values - logits.logsumexp(-1, keepdim=True)).exp().cumsum(-1).double()
    if sampling.temperature == 0:
        return mass.sqrt()
    sure = torch.cat([mass[..., :1] ** 2, mass[..., :-1]], -1)
    return sure + (1 - sure) * _OVERLAP


def _chances(logits: Tensor, tokens: Tensor, families: Tensor, sampling: Sampling) -> Tensor:
    """[batch, count, children]: how often each child that was drawn is accepted."""
    if sampling.temperature == 0:
        return families.diff(dim=-1, prepend=torch.zeros_like(families[..., :1]))
    logits = logits.float() / sampling.temperature
    tokens = tokens.view(families.shape)
    drawn = (logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)).exp().double()
    top = drawn[..., 1:]
    first = (1 - top.sum(-1, keepdim=True)) * (_OVERLAP + (1 - _OVERLAP) * drawn[..., :1])
    return torch.cat([first, top], -1)


class _Growing:
    """Trees in the making, and which of their nodes are continued next."""

    def __init__(self, context: Context, nodes: int):
        shape, device = (len(context.tokens), nodes), context.tokens.device
        self._budget, self.nodes, self.depth = context.row_depths[:, None], 1, 0
        self._tokens, self._parents = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        self._tokens[:, 0], self._parents[:, 0] = context.root, -1
        self._exists = torch.ones(shape, dtype=torch.bool, device=device)
        self._laws = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._order = torch.full_like(self._tokens, -1)  # of asking
        self._asked = self._parents[:, :0]  # [batch, asked]: parents of the nodes asked for, in that order
        self._at = torch.zeros_like(self._tokens[:, :1])  # [batch, frontier]: the nodes to be continued
        self._probs: list[tuple[Tensor, Tensor]] = []
        self.expected = torch.zeros(shape, dtype=torch.float64, device=device)  # of each node's children together

    def useful(self) -> Tensor:
        """[batch, 1] bool: rows that can use one more level."""
        return self._budget > self.depth

    def frontier(self) -> Frontier:
        """The nodes to be continued."""
        start, count = self._asked.shape[1], self._at.shape[1]
        above = self._order.gather(1, self._parents.gather(1, self._at)) if self.depth else self._parents[:, :1]
        self._asked = torch.cat([self._asked, above], 1)
        order = torch.arange(start, start + count, device=above.device)
        self._order.scatter_(1, self._at, order.expand_as(self._at))
        return Frontier(self._tokens.gather(1, self._at), Topology(self._asked, self.depth))

    def add(self, drawn: Children, expected: Tensor) -> Tensor:
        """Adds the children of the frontier's nodes; [batch, children] bool: those that exist."""
        count, new = drawn.tokens.shape[1] // self._at.shape[1], slice(self.nodes, self.nodes + drawn.tokens.shape[1])
        exists = self._exists.gather(1, self._at).repeat_interleave(count, 1)
        self._exists[:, new] = exists if drawn.exists is None else exists & drawn.exists
        self._tokens[:, new], self._parents[:, new] = drawn.tokens, self._at.repeat_interleave(count, 1)
        self._laws.scatter_(1, self._at, drawn.laws)
        self.expected.scatter_(1, self._at, expected)
        if drawn.draft_probs is not None:
            self._probs.append((self._at, drawn.draft_probs))
        self._first, self.nodes, self.depth = self.nodes, new.stop, self.depth + 1
        return self._exists[:, new]

    def turn_to(self, newest: Tensor) -> None:
        """Continue these of the newest nodes next. newest: [batch, frontier] int64, by place among them."""
        self._at = newest + self._first

    def grown(self, width: int) -> Grown:
        topology = Topology(self._parents[:, : self.nodes], self.depth, width)
        laws = torch.where(self._exists, self._laws, Law.PADDING)[:, : self.nodes]
        tree = DraftTree(self._tokens[:, : self.nodes], topology, laws, self._draft_probs())
        return Grown(tree, self._order[:, : self.nodes])

    def _draft_probs(self) -> Tensor | None:
        """[batch, node, vocab] of the nodes before the last level; zeros at leaves."""
        if not self._probs:
            return None
        table = self._probs[0][1].new_zeros((len(self._tokens), self._first, self._probs[0][1].shape[-1]))
        rows = torch.arange(len(table), device=table.device)[:, None]
        for at, probs in self._probs:
            table[rows, at] = probs
        return table
