"""Draft trees: their tokens, their shape, and how the children of each node were drawn.

One step may draft this tree, with q0 the draft's law after "the" and q1 its law after "the cat":

    0 "the"            the root: the last token of the text
    ├─ 1 "cat"         drawn from q0 without "dog"
    │  ├─ 3 "sat"      drawn from q1
    │  └─ 4 "ran"      drawn from q1
    └─ 2 "dog"         the most probable token of q0

    tokens             [[the, cat, dog, sat, ran]]                     [batch, node]
    topology.parents   [[-1, 0, 0, 1, 1]]                              [batch, node]
    laws               [[SAMPLED_THEN_TOP, IID, POINT, POINT, POINT]]  [batch, node], of each node's children
    draft_probs        [[q0, q1]]                                      [batch, internal, vocab], after nodes 0 and 1

A rule needs no more than that to be exact. A chain is a tree of width one, a step that drafts nothing a tree of one node,
and a greedy draft a tree whose nodes all say POINT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from specdec.checks import as_int, check_kind, put
from specdec.laws import Law, as_law, child_weights, is_random, normalised


@dataclass(frozen=True)
class TreeSpec:
    """What trees a drafter may produce. Rules check this promise, and buffers are made by it.

    Args:
        laws: every law by which children may be drawn.
        nodes: most nodes, the root included, in the tree and in the draft's cache.
        depth: longest path, in drafted tokens.
        width: most children of one node; 1 for chains.
        by_depth: whether a node's existence depends on no token of its own depth or below, so not on its siblings or cousins
            either. `KSeq` and `LevelVerification` rely on it, and `specdec.testing.assert_drafter` checks it.
        by_row: whether a row's tree depends on no other row. `specdec.testing` relies on it.
        by_clock: whether trees depend on measured times. Processes that share a model would then draft different trees.
    """

    laws: frozenset[Law]
    nodes: int
    depth: int
    width: int
    by_depth: bool = False
    by_row: bool = True
    by_clock: bool = False

    def __post_init__(self) -> None:
        check_kind("TreeSpec.laws", self.laws, (Set, Sequence), "pass a set of the laws that children may have")
        least = {"nodes": 1, "depth": 0, "width": 0}
        counts = {name: as_int(f"TreeSpec.{name}", getattr(self, name), least[name]) for name in least}
        put(self, laws=frozenset(map(as_law, self.laws)), **counts)


@dataclass(frozen=True, eq=False)
class Topology:
    """The shape of a batch of trees. Policies whose trees never change use one in all steps.

    Args:
        parents: [batch, node] int64: the parent of each node. parents[:, 0] == -1, and 0 <= parents[:, i] < i for i > 0.
            Siblings stand in the order they were drawn.
        depth: longest path, in edges. A host integer, so that nobody has to wait for the device.
        width: most children of a node. None: it is read from the device, which waits.
    """

    parents: Tensor  # [batch, node] int64
    depth: int
    width: int | None = None
    is_chain = False  # whether every node is known to be the child of the one before

    @cached_property
    def ancestors(self) -> Tensor:
        """[batch, node, node] bool: entry (i, j) is True when j is i or an ancestor of i."""
        index = torch.arange(self.parents.shape[1], device=self.parents.device)
        reach = ((self.parents[..., None] == index) | (index[:, None] == index)).float()
        # repeated squaring of identity + parent
        for _ in range(max(self.depth - 1, 0).bit_length()):
            reach = (reach @ reach).clamp_(max=1)
        return reach > 0

    @cached_property
    def depths(self) -> Tensor:
        """[batch, node] int64: edges from the root."""
        return self.ancestors.sum(-1) - 1

    @cached_property
    def children(self) -> Tensor:
        """[batch, node, width] int64: child indices in the order they were drawn, -1 where there is none."""
        nodes = self.parents.shape[1]
        index = torch.arange(nodes, device=self.parents.device)
        is_child = self.parents[:, None, :] == index[:, None]  # [batch, parent, child]
        width = int(is_child.sum(-1).max()) if self.width is None else self.width
        order = torch.where(is_child, index, nodes).sort(-1).values[..., :width]
        return torch.where(order < nodes, order, -1)

    @property
    def causal(self) -> Topology:
        """The same nodes, where each sees only its ancestors: in a block they see each other besides."""
        return self


class _Chain(Topology):
    is_chain = True

    @cached_property
    def ancestors(self) -> Tensor:
        batch, nodes = self.parents.shape
        return torch.ones(nodes, nodes, dtype=torch.bool, device=self.parents.device).tril().expand(batch, -1, -1)

    @cached_property
    def depths(self) -> Tensor:
        return self.parents + 1


def chain(batch: int, nodes: int, device: torch.device | str = "cpu") -> Topology:
    """The topology in which every node but the last has one child."""
    parents = torch.arange(-1, nodes - 1, device=device).expand(batch, -1)
    return _Chain(parents, nodes - 1, min(nodes - 1, 1))


class _Block(Topology):
    @cached_property
    def ancestors(self) -> Tensor:
        batch, nodes = self.parents.shape
        return torch.ones(batch, nodes, nodes, dtype=torch.bool, device=self.parents.device)

    @cached_property
    def depths(self) -> Tensor:
        return self.parents + 1

    @property
    def causal(self) -> Topology:
        return _Chain(self.parents, self.depth, self.width)


def block(batch: int, nodes: int, device: torch.device | str = "cpu") -> Topology:
    """What block drafters score: the nodes of a chain, each of which sees all of them."""
    return _Block(torch.arange(-1, nodes - 1, device=device).expand(batch, -1), nodes - 1, min(nodes - 1, 1))


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A batch of draft trees of one shape.

    Args:
        tokens: [batch, node] int64; node 0 is the root, the last committed token.
        topology: the shape.
        laws: [batch, node] uint8, the `Law` of each node's children. PADDING marks a node that the row does not have; it
            has none of the node's descendants either.
        draft_probs: [batch, internal, vocab] floating-point: the draft's weights after nodes 0, 1, ..., by which their
            children were drawn, normalised or not. They reach to the last node with a random child, or further. None if
            all children are points.
    """

    tokens: Tensor  # [batch, node] int64
    topology: Topology
    laws: Tensor  # [batch, node] uint8
    draft_probs: Tensor | None = None  # [batch, internal, vocab]

    def check(self, spec: TreeSpec, batch: int, max_depth: int, vocab: int) -> None:
        """Raise ValueError unless shapes and dtypes are as promised. `invalid` checks the values, on the device."""
        nodes, probs = self.tokens.shape[1], self.draft_probs
        parts = [("tokens", self.tokens, torch.int64), ("topology.parents", self.topology.parents, torch.int64)]
        parts.append(("laws", self.laws, torch.uint8))
        shape = [batch, nodes]
        wrong = [f"{name} is {list(part.shape)}, not {shape}" for name, part, _ in parts if list(part.shape) != shape]
        if probs is not None and list(probs.shape) != (due := [batch, probs.shape[1], vocab]):
            wrong.append(f"draft_probs is {list(probs.shape)}, not {due}")
        limits = (("nodes", nodes, spec.nodes), ("depth", self.topology.depth, min(spec.depth, max_depth)))
        wrong += [f"{name} {got}, at most {most} may be drafted now" for name, got, most in limits if got > most]
        wrong += [f"{name} of {part.dtype}, not {dtype}" for name, part, dtype in parts if part.dtype != dtype]
        if probs is not None and not probs.is_floating_point():
            wrong.append(f"draft_probs of {probs.dtype}, not of floating-point numbers")
        if wrong:
            raise ValueError(f"The drafter proposed a tree with {'; '.join(wrong)} (see TreeSpec and Batch.max_depth).")

    def padded(self, spec: TreeSpec) -> DraftTree:
        """Add absent nodes up to `spec.nodes` if it has any but the root, and take the depth and width of `spec`.

        So a run has two shapes that are captured or compiled.
        """
        nodes, pad = self.tokens.shape[1], torch.nn.functional.pad
        size = spec.nodes if nodes > 1 else 1
        if (size, spec.depth, spec.width) == (nodes, self.topology.depth, self.topology.width):
            return self
        parents, probs = pad(self.topology.parents, (0, size - nodes)), self.draft_probs
        topology = Topology(parents, spec.depth, spec.width)
        laws = pad(self.laws, (0, size - nodes), value=Law.PADDING)
        probs = None if probs is None else pad(probs, (0, 0, 0, size - probs.shape[1]))
        return DraftTree(pad(self.tokens, (0, size - nodes)), topology, laws, probs)

    def without_below(self, nodes: Tensor) -> DraftTree:
        """Mark what is below these nodes, [batch, node] bool, as absent."""
        above = (self.topology.ancestors & nodes[:, None]).sum(-1) > nodes
        return replace(self, laws=self.laws.masked_fill(above, Law.PADDING))

    def trimmed(self) -> DraftTree:
        """Without the last nodes, as far as no row has them; waits for the device."""
        count = 1 + int((self.laws != Law.PADDING).any(0).nonzero().max())
        if count == self.tokens.shape[1]:
            return self
        topology = replace(self.topology, parents=self.topology.parents[:, :count])
        probs = None if self.draft_probs is None else self.draft_probs[:, :count]
        return DraftTree(self.tokens[:, :count], topology, self.laws[:, :count], probs)

    def within(self, vocab: int) -> DraftTree:
        """Move ids outside the vocabulary into it, so that every token can be embedded; `invalid` reports them."""
        return replace(self, tokens=self.tokens.clamp(0, vocab - 1))

    def invalid(self, root: Tensor, vocab: int) -> Tensor:
        """[batch] bool: rows with another root than `root` [batch] int64, tokens outside the vocabulary, or tokens that cannot
        have been drawn as their laws say.
        """
        tokens, exists = self.within(vocab).tokens, self.laws != Law.PADDING
        wrong = (self.tokens[:, 0] != root) | ((self.tokens != tokens) & exists).any(1)
        drawn = exists & is_random(self.laws, 0)  # [batch, parent]
        if self.draft_probs is None:
            return wrong | drawn.any(1)
        internal = self.draft_probs.shape[1]
        parents = self.topology.parents.clamp(min=0, max=internal - 1)
        sampled = drawn.gather(1, parents) & exists
        sampled[:, 0] = False
        rows = torch.arange(len(root), device=root.device)[:, None]
        # written so that NaN is impossible too
        impossible = sampled & ~(self.draft_probs[rows, parents, tokens] > 0)
        totals = self.draft_probs.sum(-1, dtype=torch.promote_types(self.draft_probs.dtype, torch.float32))
        drawn_from = torch.zeros_like(totals, dtype=torch.int64).scatter_add_(1, parents, sampled.long()) > 0
        return wrong | impossible.any(1) | (drawn_from & ~totals.isfinite()).any(1)

    def row(self, row: int, normalise: Callable[[np.ndarray], np.ndarray] = normalised) -> RowTree:
        """The scalar face of one row; `normalise` turns weights [vocab] into a law, by default in float64."""
        return RowTree(self, row, normalise)


def tree_of_points(root: Tensor, drafts: Sequence[Sequence[tuple[int, int]]]) -> DraftTree:
    """Trees of POINT children, made from lists; rows may have different trees.

    >>> tree = tree_of_points(torch.tensor([7, 5]), [[(8, 0), (9, 0), (6, 1)], []])
    >>> tree.tokens  # in the first row 8 and 9 follow the root, and 6 follows 8; nothing is drafted for the second
    tensor([[7, 8, 9, 6],
            [5, 0, 0, 0]])
    >>> tree.topology.depths
    tensor([[0, 1, 1, 2],
            [0, 1, 1, 1]])

    Args:
        root: [batch] int64, the last committed tokens.
        drafts: for each row the (token, parent) of nodes 1, 2, ...; parents come first, and siblings differ.
    """
    nodes = 1 + max(map(len, drafts))
    tokens, parents, laws = [], [], []
    depth, width = 0, 0
    for draft in drafts:
        depths, children = [0], [0] * nodes
        for _, parent in draft:
            depths.append(depths[parent] + 1)
            children[parent] += 1
        depth, width, missing = max(depth, *depths), max(width, *children), nodes - 1 - len(draft)
        tokens.append([0, *(token for token, _ in draft), *[0] * missing])
        parents.append([-1, *(parent for _, parent in draft), *[0] * missing])
        laws.append([Law.POINT] * (1 + len(draft)) + [Law.PADDING] * missing)
    table = torch.tensor([tokens, parents, laws], device=root.device)
    tokens = torch.cat([root[:, None], table[0, :, 1:]], 1)
    return DraftTree(tokens, Topology(table[1], depth, width), table[2].to(torch.uint8))


@dataclass
class RowTree:
    """One row of a draft tree, for specifications: plain lists and numpy arrays."""

    tree: DraftTree
    row: int
    normalise: Callable[[np.ndarray], np.ndarray]
    tokens: list[int] = field(init=False)
    parents: list[int] = field(init=False)
    laws: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.tree.tokens[self.row].tolist()
        self.parents = self.tree.topology.parents[self.row].tolist()
        self.laws = self.tree.laws[self.row].tolist()

    def children(self, node: int) -> list[int]:
        """Node indices of the children, in the order they were drawn."""
        later = range(node + 1, len(self.parents))
        return [i for i in later if self.parents[i] == node and self.laws[i] != Law.PADDING]

    def weights(self, node: int, vocab: int) -> np.ndarray:
        """[vocab] float64: the weights that a node's random children were drawn by; all 0 if it has none."""
        probs = self.tree.draft_probs
        if probs is None or node >= probs.shape[1] or not is_random(self.laws[node], 0):
            return np.zeros(vocab)
        return probs[self.row, node].double().numpy(force=True)

    def draws(self, node: int, vocab: int) -> Iterator[tuple[int, np.ndarray]]:
        """(child, law [vocab] that its token was drawn from given the parent and the earlier siblings), in order."""
        siblings, weights = self.children(node), self.weights(node, vocab)
        tokens = [self.tokens[child] for child in siblings]
        for slot, child in enumerate(siblings):
            yield child, self.normalise(child_weights(self.laws[node], weights, tokens, slot))
