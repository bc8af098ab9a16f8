"""Level verification of every row at once: the numbers of the specification in `rule.py`, with the same names.

`Levels` holds the flows of all nodes; for one depth at a time, a `_Wave` tries the children; `_Members` lists which nodes take
part. All is in float64: the mass left once a draft's likely tokens have failed may be too small for float32.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from specdec.laws import Law, excludes_elders, is_random
from specdec.rules.children import Siblings
from specdec.target_law import TargetLaw
from specdec.tree import DraftTree
from specdec_kernels.reference.early_exit import all_false_cheaply

BOUNDS = 4  # fixed-point iterations for the bounds on reaching each try; after k the first k tries are exact


class Levels:
    """The flows of all nodes and the mass they owe, after all tries.

    Tensors over nodes are [batch, node]; tensors over tokens are [member, vocab], for the nodes that take part alone.
    """

    def __init__(self, tree: DraftTree, target_law: TargetLaw, rounds: int):
        self.tree, topology = tree, tree.topology
        self.exists = tree.laws != Law.PADDING
        self.parents, self.depths = topology.parents.clamp(min=0), topology.depths
        self.index = torch.arange(tree.tokens.shape[1], device=self.parents.device)
        self._take_turns()
        child = self.exists & (topology.parents >= 0)
        self.has_children = torch.zeros_like(self.parents).scatter_add_(1, self.parents, child.long()) > 0
        self.inner = _Members(self.has_children)
        self.flow = torch.zeros_like(self.exists, dtype=torch.float64)
        self.owed = self.flow.new_zeros(len(self.inner.rows), target_law.vocab)  # [member, vocab]
        self.flow[:, 0] = 1
        self.failed = self.flow.new_ones(len(self.flow), topology.depth + 1)  # by depth
        width = topology.children.shape[-1]
        phases, halves = (1, (False,)) if width < 2 else (max(2, (width + 1) // 2), (False, True))
        for depth in range(topology.depth):
            level = self._descend(depth, target_law)
            for phase, left, second in product(range(phases), range(rounds, 0, -1), halves):
                level.wave(phase, left, rounds, second)
        self.owed.clamp_(min=0)  # negative by rounding only

    def _take_turns(self) -> None:
        """Find when each node is tried, and how many siblings share with it: [batch, node] each."""
        siblings = self.tree.topology.parents[:, :, None] == self.tree.topology.parents[:, None]
        elder = siblings & (self.index < self.index[:, None])
        self.slot = elder.sum(-1)  # among all siblings, padding too
        rank = (elder & self.exists[:, None]).sum(-1)  # among those that exist
        law = self.tree.laws.gather(1, self.parents)
        pairs, drawn = excludes_elders(law), is_random(law, rank)
        real = drawn & self.exists
        draws = (siblings & real[:, None]).sum(-1)
        self.point = ~drawn
        # points come after all drawn siblings
        turn = torch.where(drawn, rank, draws + 1)
        self.phase = torch.where(pairs, turn // 2, (self.point & (draws > 0)).long())
        mates = siblings & (pairs & drawn)[..., None] & real[:, None] & ((rank ^ 1)[..., None] == rank[:, None])
        self.paired, self.mate = mates.any(-1), mates.long().argmax(-1)
        self.second = self.paired & (rank % 2 == 1)
        self.sharers = torch.where(pairs, 1, draws)

    def _descend(self, depth: int, target_law: TargetLaw) -> _Wave:
        """The mass owed at the nodes of one depth, and their children, ready to be tried."""
        reached = self.flow > 0
        parents = _Members(self.has_children & reached & (self.depths == depth))
        place = self.inner.place[parents.rows, parents.nodes]
        law = target_law.at(parents.nodes * parents.holds, parents.rows)
        mass = law * self.flow[parents.rows, parents.nodes][:, None]
        self.owed.index_copy_(0, place, torch.where(parents.holds[:, None], mass, self.owed[place]))
        children = self.exists & reached.gather(1, self.parents) & (self.depths == depth + 1)
        return _Wave(self, _Members(children), depth)

    def accepted(self, coin: Tensor) -> Tensor:
        """[batch, 1]: the first node whose coin comes up, the deepest nodes first."""
        mass = self.flow.clone()
        rows, nodes = self.inner.rows, self.inner.nodes
        tried = self.inner.holds & (self.flow[rows, nodes] > 0)
        mass[rows, nodes] = torch.where(tried, self.owed.sum(1), mass[rows, nodes])
        chance = _divide(mass * self.exists, self.failed.gather(1, self.depths.clamp(max=self.failed.shape[1] - 1)))
        elder = (self.depths[:, :, None] == self.depths[:, None]) & (self.index < self.index[:, None])
        left = 1 - (elder.to(chance.dtype) @ chance[..., None])[..., 0]
        width = len(self.index)
        heads = (left > 0) & (coin[:, :width] < _divide(chance, left)) & self.exists
        heads[:, 0] = True
        order = self.depths * width + width - 1 - self.index
        return torch.where(heads, order, -1).argmax(1, keepdim=True)

    def law(self, node: Tensor, target_law: TargetLaw) -> Tensor:
        """[batch, vocab], not normalised: the law to emit from after `node` [batch, 1] int64."""
        if not len(self.owed):
            return target_law.at(node[:, 0])
        owed = self.owed[self.inner.place.gather(1, node)[:, 0]]
        tried = self.has_children.gather(1, node) & (self.flow.gather(1, node) > 0) & (owed.sum(1, keepdim=True) > 0)
        return torch.where(tried, owed, target_law.at(torch.where(tried, 0, node)[:, 0]))


class _Wave:
    """The children of one depth, and the laws of their tokens given the failures so far."""

    def __init__(self, state: Levels, members: _Members, depth: int):
        self.state, self.members, self.depth = state, members, depth
        rows, nodes = members.rows, members.nodes
        self.parent = state.inner.place[rows, state.parents[rows, nodes]]
        self.token = state.tree.tokens[rows, nodes][:, None]
        order = state.flow.gather(1, state.parents).sort(dim=1, descending=True, stable=True).indices
        self.turns = order.argsort(1)[rows, nodes]  # the children of the likeliest parents come first
        self.unmet = state.flow.new_ones(len(state.flow), 1)  # chance that all tries so far fail, given the tokens
        siblings = Siblings(state.tree, state.parents[rows, nodes], state.owed.dtype, rows)
        child = siblings.child(state.slot[rows, nodes][:, None])
        # [member, vocab]: law x chance of having failed
        self.weights = child.dense(state.owed[:1].expand(len(rows), -1))
        self.paired, self.mate = state.paired[rows, nodes], members.place[rows, state.mate[rows, nodes]]
        self.pairs = bool(len(rows)) and not all_false_cheaply(self.paired)
        if self.pairs:  # as long as no token is known, the second of a pair has the law of the first
            second = state.second[rows, nodes][:, None]
            self.weights = torch.where(second, self.weights[self.mate], self.weights)
            self.after = _all_others(self.weights)  # the mass left for the second, by the first's token

    def wave(self, phase: int, left: int, rounds: int, second: bool) -> None:
        """Try every child whose turn it is, with `left` of the rounds to go."""
        state, rows, nodes = self.state, self.members.rows, self.members.nodes
        turn = (state.phase == phase) & (state.second == second) & (~state.point | (left == rounds))
        turn = turn[rows, nodes] & self.members.holds
        who = turn.nonzero()[:, 0] if turn.device.type == "cpu" else torch.arange(len(turn), device=turn.device)
        if not len(who):
            return
        rows, nodes, turns, parent = rows[who], nodes[who], self.turns[who], self.parent[who]
        law, share = self._offer(who, left, second)
        share = share * state.owed[parent].clamp(min=0) * turn[who][:, None]
        failed = state.failed[:, self.depth : self.depth + 1]
        reached = failed[rows]
        for _ in range(BOUNDS):
            take = torch.minimum(law, _divide(share, reached))
            reached, after = _in_turn(rows, turns, take.sum(1), failed, len(state.index))
        failed.copy_(after)
        hit = _divide(take, law)
        met = hit.gather(1, self.token[who])
        unmet, self.unmet = _in_turn(rows, turns, met[:, 0], self.unmet, len(state.index))
        state.flow[rows, nodes] += (unmet * met)[:, 0]
        state.owed.index_add_(0, parent, take * reached, alpha=-1)
        self.weights[who] *= 1 - hit

    def _offer(self, who: Tensor, left: int, second: bool) -> tuple[Tensor, Tensor]:
        """The laws [n, vocab] of the members `who` [n] int64, and the shares of the mass owed that they are offered."""
        state, rows, nodes = self.state, self.members.rows[who], self.members.nodes[who]
        law = _scaled(self.weights[who])
        share = torch.where(state.point[rows, nodes], 1, 1 / (left * state.sharers[rows, nodes]).double())[:, None]
        if not self.pairs:
            return law, share
        mate = self.mate[who]
        first, other = (mate, who) if second else (who, mate)
        a, b = _divide(self.weights[first], self.after[first]), self.weights[other]
        laws = _scaled(a * _all_others(b)), _scaled(b * _all_others(a))
        mine = laws[second]
        # at the turn of the second, the first has had its try of this round
        offered = _divide(mine, laws[0] * (left - second) + laws[1] * left)
        paired = self.paired[who][:, None]
        return torch.where(paired, mine, law), torch.where(paired, offered, share)


class _Members:
    """The nodes at which `where` [batch, node] bool holds. On a CPU only these; elsewhere all nodes, with the mask `holds`."""

    def __init__(self, where: Tensor):
        rows, nodes = torch.meshgrid(*(torch.arange(n, device=where.device) for n in where.shape), indexing="ij")
        pick = where if where.device.type == "cpu" else slice(None)
        self.rows, self.nodes, self.holds = rows[pick].flatten(), nodes[pick].flatten(), where[pick].flatten()
        index = torch.arange(len(self.rows), device=where.device)
        # [batch, node] int64: the place of each node in the list
        self.place = torch.zeros_like(rows).index_put_((self.rows, self.nodes), index)


def _in_turn(rows: Tensor, turns: Tensor, chance: Tensor, start: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Events that take turns within a row: the chance that no earlier one happened, and that none happened.

    Args:
        rows: [member] int64: the row of each event.
        turns: [member] int64: its place in the order of its row.
        chance: [member]: that it happens, when its turn comes.
        start: [batch, 1]: the chance that the first turn comes.
        width: most events of a row.

    Returns:
        [member, 1]: the chance that no earlier event happened; [batch, 1]: the chance that none did.
    """
    fails = start.new_ones(len(start), width)
    fails[rows, turns] = 1 - chance
    none = start * fails.cumprod(1)
    return torch.cat([start, none], 1)[rows, turns][:, None], none[:, -1:]


def _all_others(weights: Tensor) -> Tensor:
    """`_others` for each row of [batch, vocab]."""
    top = weights.argmax(1, keepdim=True)
    rest = weights.scatter(1, top, 0)
    total = rest.sum(1, keepdim=True)
    return (total - rest + weights.gather(1, top)).scatter(1, top, total)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def _scaled(weights: Tensor) -> Tensor:
    return _divide(weights, weights.sum(1, keepdim=True))
