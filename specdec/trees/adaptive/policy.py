"""Adaptive trees: every step drafts as much as pays, and nothing when nothing does.

A level or a node is worth drafting when the tokens it is expected to add are worth its time at the speed that decoding has
anyway (Dinkelbach's rule for the largest ratio of expected tokens to time; new here in this form). What is expected comes from
the draft's confidence and from what became of earlier drafts, `specdec.trees.adaptive.price` says how.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.checks import check_kind, put_size
from specdec.coins import Coins
from specdec.laws import Law, drawn_laws
from specdec.outcome import Outcome
from specdec.sampling import Sampling
from specdec.theory import Costs
from specdec.tree import DraftTree, Topology, TreeSpec
from specdec.trees.adaptive.hit_rates import Times
from specdec.trees.adaptive.price import Economy
from specdec.trees.base import Frontier, Grown, Growth, TreePolicy, TreeRun
from specdec.trees.draw import Children, draw

_LAGGARDS = 8  # a row with a tenth less time to go counts half
_USUAL = 16  # steps of one token that the pace of a row begins with
_REST = 7  # steps at most from one thought to the next, where drafts do not pay: thinking takes time too
_OVERLAP = 0.5  # of a flat draft law with the target's, on the demo pair at temperature 1; outcomes correct it


@dataclass(frozen=True)
class Adaptive(TreePolicy):
    """Depth and widths chosen level by level from measured times and acceptance; no draft where none pays.

    Every level continues the most promising of the newest nodes and gives each the same number of children. Both numbers
    are chosen before the level is drawn, from what was drawn above it and from earlier steps, and nothing drawn is dropped:
    so it is lossless. They are chosen for the batch as a whole, so that a row's text depends on the other rows, and unless
    `costs` are given on the clock, so that a seed does not repeat a run: its law stays the target's all the same.

    Sampled children are drawn as SAMPLED_THEN_TOP, a single one from the draft's law. A draft that is never accepted costs
    about 2 tokens, and 1 % of the steps: see `hit_rates.Rate`. Where drafts hardly pay, 5 % of the steps go
    without one, and 2 % where they clearly do, to know what that takes; where they do not pay, every eighth step thinks of one.
    Without `costs` a run that goes on from an earlier one of that batch size begins with what that has learned.

    Args:
        nodes: most nodes of a tree, the root included.
        depth: longest path.
        width: most children of a node, and most nodes continued per level; 1 for chains.
        costs: measured times, as from `specdec.theory.measure_costs`; None: the run's own steps are timed. Processes that
            share a model (tensor parallelism) need them, and the same in all, or they would draft different trees.
    """

    nodes: int = 24
    depth: int = 8
    width: int = 3
    costs: Costs | None = None

    def __post_init__(self) -> None:
        put_size(self)
        check_kind(
            "costs", self.costs, (Costs, type(None)), "measure them: specdec.theory.measure_costs(target, draft)"
        )
        if self.costs is not None and self.costs.verify.nodes[-1] < self.nodes:
            raise ValueError(
                f"nodes={self.nodes}, but costs.verify was measured up to {self.costs.verify.nodes[-1]}: measure more "
                "(measure_costs(nodes=...)) or lower `nodes`."
            )

    def spec(self, sampling: Sampling) -> TreeSpec:
        laws = drawn_laws(Law.IID, sampling)
        if self.width > 1:
            laws |= drawn_laws(Law.SAMPLED_THEN_TOP, sampling)
        clock = self.costs is None
        return TreeSpec(laws, self.nodes, self.depth, self.width, by_depth=True, by_row=False, by_clock=clock)

    def start(self, batch: Batch, last: TreeRun | None = None) -> TreeRun:
        return _AdaptiveRun(self, batch, last if isinstance(last, _AdaptiveRun) else None)


class _AdaptiveRun(TreeRun):
    """What one run has learned; the next one of that batch size may begin with it."""

    policy: Adaptive

    def __init__(self, policy: Adaptive, batch: Batch, last: _AdaptiveRun | None):
        super().__init__(policy, batch)
        known = last is not None and last.policy == policy and len(last.batch) == len(batch) and policy.costs is None
        self._economy = last._economy if last is not None and known else self._made()
        self._economy.turn_to_another_text()
        self._begun = list(batch.host_lengths)
        self._expected: np.ndarray | None = None
        self._grown = False
        self._rest = self._rested = 0  # steps without a thought: how many the last time or still to come, and so far

    def _made(self) -> Economy:
        policy = self.policy
        if policy.costs is None:
            return Economy(Times(policy.nodes), Times(1), Times(policy.width))
        draft = policy.costs.draft or (lambda nodes: 0.0)
        return Economy(Times(policy.nodes, policy.costs.verify), Times(1, draft), Times(policy.width, draft))

    def grow(self, coins: Coins) -> Growth:
        policy, batch, economy = self.policy, self.batch, self._economy
        if self._rested < self._rest:
            self._rested += 1
            return _silent(batch)
        self._expected, self._grown = None, True
        weights = self._weights(batch.host_lengths, batch.host_left)
        last = 1 / sum(weight**2 for weight in weights)  # how many rows may be the last
        left = sum(weight * left for weight, left in zip(weights, batch.host_left, strict=True))
        economy.begin(min(policy.depth, batch.max_depth), last, left, 1 + self._rested)
        going, self._rested = economy.continues(), 0
        self._rest = min(2 * self._rest + 1, _REST) if economy.sure and not going else 0
        if not going:
            economy.finish()
            return _silent(batch)
        tree = _Growing(batch.root, [left - 1 for left in batch.host_left], policy.nodes)
        weight = np.array(weights)[:, None]
        # [batch, frontier]: the chance of each node of the frontier to be accepted, times the row's weight
        reach = weight * tree.useful()
        while going:
            logits = yield tree.frontier()
            families = _families(logits, min(policy.width, economy.room, logits.shape[-1]), batch.sampling)
            count = economy.children(reach.sum().item(), (reach[..., None] * families).sum((0, 1)).tolist())
            if count == 0:
                break
            law = Law.SAMPLED_THEN_TOP if count > 1 else Law.IID
            drawn = draw(logits, count, law, batch.sampling, coins, tree.nodes)
            chances = np.minimum(economy.calibration * _chances(drawn, families[..., :count]), 1)
            exists = tree.add(drawn, families[..., count - 1] * tree.useful())
            reach = (reach[..., None] * chances).reshape(len(weights), -1) * exists * tree.useful()
            best = (-reach).argsort(1, kind="stable")[:, : policy.width]
            reach = reach[tree.rows, best]
            count = economy.frontier(reach.sum(0).tolist())
            reach, going = reach[:, :count], economy.continues()
            tree.turn_to(best[:, :count])
        economy.finish()
        self._expected = np.concatenate([weight, tree.expected], 1)
        return tree.grown(policy.width)

    def _weights(self, lengths: list[int], left: list[int]) -> list[float]:
        """Of the rows, together 1: a batch ends with its last row, so rows with most time to go count most."""
        # all rows have made as many steps, so what a row has gained is its pace
        rows = zip(lengths, left, self._begun, strict=True)
        to_go = [budget / (length - begun + _USUAL) for length, budget, begun in rows]
        most = max(to_go)
        powers = [(each / most) ** _LAGGARDS for each in to_go]
        total = sum(powers)
        return [power / total for power in powers]

    def commit(self, outcome: Outcome) -> None:
        if not self._grown:
            return
        self._grown = False
        if self._expected is None:  # nothing was drafted
            return self._economy.learn([])
        paths, kept = outcome.path.cpu().numpy(), outcome.keep.tolist()
        rows = zip(self._expected, paths, kept, outcome.left, strict=True)
        self._economy.learn([(row[0], row[path[:keep] + 1].tolist()) for row, path, keep, left in rows if left])


def _silent(batch: Batch) -> Grown:
    tree = batch.undrafted()
    return Grown(tree, tree.topology.parents)


def _families(logits: Tensor, most: int, sampling: Sampling) -> np.ndarray:
    """[batch, count, most]: how often one of the first 1, 2, ... children of each node is accepted, by the draft's confidence.

    Greedy, the target's token is among the draft's top k about as often as the square root of their mass (fits the demo pair
    to 0.05). Sampled, the top k - 1 have their mass of the target's law, and the rest overlaps by half.
    """
    logits = logits.float() / sampling.temperature if sampling.temperature else logits.float()
    mass = logits.softmax(-1).topk(most, -1).values.cpu().numpy().cumsum(-1, dtype=np.float64)
    mass = np.nan_to_num(mass)  # of logits that are no law, which the drafter tells; what is learned outlives the run
    if sampling.temperature == 0:
        return np.sqrt(mass)
    sure = np.concatenate([mass[..., :1] ** 2, mass[..., :-1]], -1)
    return sure + (1 - sure) * _OVERLAP


def _chances(drawn: Children, families: np.ndarray) -> np.ndarray:
    """[batch, count, children]: how often each child that was drawn is accepted."""
    if drawn.draft_probs is None:
        return np.concatenate([families[..., :1], families[..., 1:] - families[..., :-1]], -1)
    probs = drawn.draft_probs.gather(-1, drawn.tokens.view(families.shape)).cpu().numpy()
    top = probs[..., 1:]
    first = (1 - top.sum(-1, keepdims=True)) * (_OVERLAP + (1 - _OVERLAP) * probs[..., :1])
    return np.concatenate([first, top], -1)


class _Growing:
    """Trees in the making, and which of their nodes are continued next: shapes on the host, which decides, tokens elsewhere.

    Args:
        root: [batch] int64.
        budgets: [batch] ints: depth to which each row has use for a draft.
        nodes: most nodes.
    """

    def __init__(self, root: Tensor, budgets: list[int], nodes: int):
        shape = (len(root), nodes)
        self._budgets, self.rows = np.array(budgets)[:, None], np.arange(len(root))[:, None]
        self.nodes, self.depth, self._newest = 1, 0, root[:, None]  # [batch, n]: tokens of the last level
        self._tokens, self._probs = [self._newest], list[Tensor]()  # of nodes in the order of asking
        self._parents, self._order = np.full((2, *shape), -1)  # of asking
        self._exists, self._laws = np.ones(shape, bool), np.zeros(shape, np.uint8)
        self._asked = self._parents[:, :0]  # [batch, asked]: parents of the nodes asked for, in that order
        self._at = np.zeros((len(root), 1), np.int64)  # [batch, frontier]: the nodes to be continued
        self.expected = np.zeros(shape)  # of each node's children together

    def useful(self) -> np.ndarray:
        """[batch, 1] bool: rows that can use one more level."""
        return self._budgets > self.depth

    def frontier(self) -> Frontier:
        """The nodes to be continued."""
        start, count = self._asked.shape[1], self._at.shape[1]
        above = self._order[self.rows, self._parents[self.rows, self._at]] if self.depth else self._parents[:, :1]
        self._asked = np.concatenate([self._asked, above], 1)
        self._order[self.rows, self._at] = np.arange(start, start + count)
        tokens = self._newest
        if self.depth:
            tokens = tokens.gather(1, torch.from_numpy(self._at - self._first).to(tokens.device))
        return Frontier(tokens, _topology(self._asked, self.depth, None, tokens.device))

    def add(self, drawn: Children, expected: np.ndarray) -> np.ndarray:
        """Adds the children of the frontier's nodes; [batch, children] bool: those that exist."""
        count, new = drawn.tokens.shape[1] // self._at.shape[1], slice(self.nodes, self.nodes + drawn.tokens.shape[1])
        exists = self._exists[self.rows, self._at].repeat(count, 1)
        self._exists[:, new] = exists if drawn.exists is None else exists & drawn.exists.cpu().numpy()
        self._parents[:, new] = self._at.repeat(count, 1)
        self.expected[self.rows, self._at] = expected
        if drawn.draft_probs is not None:  # at temperature 0 all are POINT
            self._laws[self.rows, self._at] = drawn.laws.cpu().numpy()
            self._probs.append(drawn.draft_probs)
        self._newest = drawn.tokens
        self._tokens.append(drawn.tokens)
        self._first, self.nodes, self.depth = self.nodes, new.stop, self.depth + 1
        return self._exists[:, new]

    def turn_to(self, newest: np.ndarray) -> None:
        """Continue these of the newest nodes next. newest: [batch, frontier] int64, by place among them."""
        self._at = newest + self._first

    def grown(self, width: int) -> Grown:
        tokens = torch.cat(self._tokens, 1)
        topology = _topology(self._parents[:, : self.nodes], self.depth, width, tokens.device)
        laws = np.where(self._exists, self._laws, Law.PADDING)[:, : self.nodes].astype(np.uint8)
        tree = DraftTree(tokens, topology, torch.from_numpy(laws).to(tokens.device), self._draft_probs())
        return Grown(tree, torch.from_numpy(self._order[:, : self.nodes]).to(tokens.device))

    def _draft_probs(self) -> Tensor | None:
        """[batch, node, vocab] of the nodes before the last level; of leaves anything."""
        if not self._probs:
            return None
        table, order = torch.cat(self._probs, 1), self._order[:, : self._first]
        if (order == np.arange(self._first)).all():
            return table
        index = torch.from_numpy(order.clip(min=0)).to(table.device)
        return table.gather(1, index[..., None].expand(-1, -1, table.shape[-1]))


def _topology(parents: np.ndarray, depth: int, width: int | None, device: torch.device) -> Topology:
    return _shape(parents.tobytes(), len(parents), depth, width, device)


@lru_cache(maxsize=1024)  # few shapes make up most of a run; what is derived from each is kept with it
def _shape(parents: bytes, batch: int, depth: int, width: int | None, device: torch.device) -> Topology:
    return Topology(torch.tensor(np.frombuffer(parents, np.int64)).view(batch, -1).to(device), depth, width)
