"""What a step was decided on: all that another rule needs to decide it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.coins import Coins
from specdec.laws import Law
from specdec.rules.base import Decisions
from specdec.target_law import TargetLaw
from specdec.tree import DraftTree, Topology, TreeSpec


class Packed(NamedTuple):
    """A tensor without loss: every entry or, if that takes less memory, the nonzero ones and their places."""

    shape: tuple[int, ...]
    values: Tensor  # [n]: the entries that are kept
    where: Tensor | None  # [n] int32 or int64: their places in the flattened tensor; None if all entries are kept

    @classmethod
    def of(cls, tensor: Tensor) -> Packed:
        """Pack a copy of the tensor, on the CPU."""
        flat = tensor.flatten()
        places = flat.nonzero()[:, 0]
        places = places.to(torch.int32 if len(flat) < 2**31 else torch.int64)
        sparse = len(places) * (places.itemsize + flat.itemsize) < len(flat) * flat.itemsize
        return cls(tuple(tensor.shape), *map(_kept, (flat[places], places) if sparse else (flat, None)))

    def tensor(self) -> Tensor:
        if self.where is None:
            return self.values.view(self.shape)
        return self.values.new_zeros(prod(self.shape)).index_put_((self.where.long(),), self.values).view(self.shape)


@dataclass(frozen=True, eq=False)
class Record:
    """All that one step was decided on. A record needs no other, so a trace may hold records of several runs.

    Laws are kept as the rule saw them, the target's at every node: 4 bytes x vocab x nodes for every row and step (twice
    that with sampled draft laws at every node), or 8 bytes for each possible token under top-k, top-p and greedy decoding.

    Args:
        seed, keys, steps: what the coins follow from; keys and steps by row.
        spec: what the drafter promised.
        stop_tokens: [n] int64.
        budget: [batch] int64: tokens that each row might still emit before this step; 0 for rows that had ended.
        bare: the trees without their `draft_probs`.
        draft: the `draft_probs`; None if there were none.
        target: [batch, node, vocab]: the target's laws.
        decisions: what the rule decided, before stop tokens and budgets.
    """

    seed: int
    keys: list[int]
    steps: list[int]
    spec: TreeSpec
    stop_tokens: Tensor
    budget: Tensor
    bare: DraftTree
    draft: Packed | None
    target: Packed
    decisions: Decisions

    @classmethod
    def of(cls, tree: DraftTree, law: TargetLaw, decisions: Decisions, **run: Any) -> Record:
        """A record of copies on the CPU; `run` holds the other fields: seed, keys, steps, spec, stop_tokens, budget."""
        parents, laws = _kept(tree.topology.parents), _kept(tree.laws)
        bare = DraftTree(_kept(tree.tokens), Topology(parents, tree.topology.depth, tree.topology.width), laws)
        rows, nodes = (torch.ones_like(tree.tokens).cumsum(axis) - 1 for axis in (0, 1))
        target = law.at(nodes.flatten(), rows.flatten()).view(*nodes.shape, law.vocab)
        draft = None if tree.draft_probs is None else Packed.of(tree.draft_probs)
        decided = Decisions(*map(_kept, (decisions.path, decisions.accepted, decisions.token)))
        run = {name: _kept(part) if isinstance(part, Tensor) else part for name, part in run.items()}
        return cls(bare=bare, draft=draft, target=Packed.of(target), decisions=decided, **run)

    def tree(self) -> DraftTree:
        """The trees that were proposed."""
        return replace(self.bare, draft_probs=None if self.draft is None else self.draft.tensor())

    def law(self) -> TargetLaw:
        """The target's law, as a rule asks for it."""
        return _Recorded(self.target.tensor())

    def coins(self) -> Coins:
        """The coins of this step."""
        batch, nodes = self.bare.tokens.shape
        coins = Coins(self.seed, batch, nodes)
        coins.enter(range(batch), self.keys, self.steps)
        return coins

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by name, and all the rest as values that JSON can hold."""
        topology, packed = self.bare.topology, {"draft": self.draft, "target": self.target}
        tensors = {
            "tokens": self.bare.tokens,
            "parents": topology.parents,
            "laws": self.bare.laws,
            **vars(self.decisions),
        }
        tensors |= {"stop_tokens": self.stop_tokens, "budget": self.budget}
        tensors |= {f"{name}.values": part.values for name, part in packed.items() if part is not None}
        tensors |= {f"{name}.where": part.where for name, part in packed.items() if part and part.where is not None}
        spec = {**asdict(self.spec), "laws": sorted(map(int, self.spec.laws))}
        rest = {
            "seed": self.seed,
            "keys": self.keys,
            "steps": self.steps,
            "spec": spec,
            "depth": topology.depth,
            "width": topology.width,
        }
        return tensors, {**rest, "shapes": {name: part.shape for name, part in packed.items() if part is not None}}

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Record:
        """The inverse of `to_file`."""
        spec = TreeSpec(**{**rest["spec"], "laws": frozenset(map(Law, rest["spec"]["laws"]))})
        topology = Topology(tensors["parents"], rest["depth"], rest["width"])
        packed = {
            name: Packed(tuple(shape), tensors[f"{name}.values"], tensors.get(f"{name}.where"))
            for name, shape in rest["shapes"].items()
        }
        return cls(
            rest["seed"], rest["keys"], rest["steps"], spec, tensors["stop_tokens"], tensors["budget"],
            DraftTree(tensors["tokens"], topology, tensors["laws"]), packed.get("draft"), packed["target"],
            Decisions(tensors["path"], tensors["accepted"], tensors["token"]),
        )  # fmt: skip


class _Recorded(TargetLaw):
    """The target's law by its recorded laws [batch, node, vocab]."""

    def __init__(self, laws: Tensor):
        self._laws, self._rows, self.vocab = laws, torch.arange(len(laws)), laws.shape[-1]

    def at(self, nodes: Tensor, rows: Tensor | None = None) -> Tensor:
        return self._laws[self._rows if rows is None else rows, nodes]

    def probabilities(self, row: int, node: int) -> np.ndarray:
        return self._laws[row, node].double().numpy()


def _kept(tensor: Tensor | None) -> Any:
    """A copy on the CPU, which nothing else writes to."""
    return None if tensor is None else tensor.cpu().clone(memory_format=torch.contiguous_format)
