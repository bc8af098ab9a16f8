"""Random inputs of recurrences over trees, ragged and poisoned, and what is right of their results, for every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.reference.gated_delta import gated_delta
from specdec_kernels.reference.linear_attention import fold_linear_attention, linear_attention

REFERENCES = {"linear_attention": linear_attention, "gated_delta": gated_delta}

# Relative, norm over norm, against the specification in float64 on the same inputs. Kernels compute in float32 whatever the
# inputs are. Measured in the interpreter: 3e-7. One product of tf32 in place of three would be off by 3e-4.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """What to draw. The first row of a batch keeps nothing of the last step, the second all of its path."""

    nodes: int
    earlier: int = 0  # nodes of the tree before those that read
    kept: int | None = 6  # length of the paths that are folded; None: no fold
    key_heads: int = 1
    heads: int = 2
    dim: int = 24
    value_dim: int = 40
    batch: int = 3
    dtype: torch.dtype = torch.float32  # of the inputs; the state is in float32
    alike: bool = False  # keys as those of a token that is repeated, which nothing decays


def draw(op: str, case: Case, seed: int, device: str = "cpu") -> dict[str, Any]:
    """The arguments of an op: memory as in a cache, with NaN where nothing may be read."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, nodes = case.batch, case.nodes + case.earlier
    state, ancestors = random(batch, case.heads, case.dim, case.value_dim), _trees(batch, nodes, generator)
    decay = -random(batch, nodes, case.heads).exp() * (not case.alike)
    key = torch.nn.functional.normalize(random(batch, 1 if case.alike else nodes, case.key_heads, case.dim), dim=-1)
    arguments: dict[str, Any] = {
        "query": random(batch, case.nodes, case.key_heads, case.dim).to(case.dtype),
        "key": _in_scratch(key.expand(-1, nodes, -1, -1).to(case.dtype)),
        "value": random(batch, case.heads, case.value_dim, nodes).to(case.dtype).permute(0, 3, 1, 2),
        "decay": _in_scratch(decay),
        "state": state,
        "ancestors": ancestors,
        "fold": None if case.kept is None else _fold(case, random, generator),
    }
    if op == "gated_delta":
        arguments["value"] = arguments["value"][:, case.earlier :]
        arguments["beta"] = random(batch, case.nodes, case.heads).sigmoid().to(case.dtype)
        arguments["update"] = random(batch, nodes, case.heads, case.value_dim)
        arguments["update"][:, case.earlier :] = torch.nan
    return {name: _map(lambda x: x.to(device), value) for name, value in arguments.items()}


def assert_right(op: str, arguments: dict[str, Any], call: Callable[..., Tensor]) -> None:
    """The call returns and writes what the specification does in float64; rows that keep nothing have the very same state."""
    state = arguments["state"].clone()
    due = {name: _map(lambda x: x.double() if x.is_floating_point() else x, x) for name, x in arguments.items()}
    pairs = {"output": (call(**arguments), REFERENCES[op](**due))}
    pairs |= {name: (arguments[name], due[name]) for name in ("state", "update") if name in due}
    for name, (x, exact) in pairs.items():
        assert x.shape == exact.shape and x.dtype == torch.float32
        error = float((x.double() - exact).norm() / exact.norm())
        assert error < TOLERANCE, f"{name} off by {error:.1e}, at most {TOLERANCE:.0e} is rounding"
    ended = slice(None) if arguments["fold"] is None else arguments["fold"][4] == 0
    assert torch.equal(arguments["state"][ended], state[ended]), "a row that keeps nothing"


def assert_folds(case: Case, seed: int, call: Callable[..., None], device: str = "cpu") -> None:
    """The call brings a state to the end of the kept nodes."""
    arguments = draw("linear_attention", case, seed, device)
    state, fold = arguments["state"], arguments["fold"]
    found, due = state.clone(), state.double()
    call(found, *fold)
    fold_linear_attention(due, *(x.double() if x.is_floating_point() else x for x in fold))
    assert float((found.double() - due).norm() / due.norm()) < TOLERANCE
    ended = fold[4] == 0
    assert torch.equal(found[ended], state[ended]), "a row that keeps nothing"
    assert not torch.equal(found[~ended], state[~ended])


def _fold(case: Case, random: Callable[..., Tensor], generator: torch.Generator) -> list[Tensor]:
    """Key, value, decay, path, count: NaN in all nodes but those that are kept."""
    steps = case.kept or 0
    room = steps + 5
    key, value = (
        random(case.batch, room, *tail) for tail in ((case.key_heads, case.dim), (case.heads, case.value_dim))
    )
    decay = -random(case.batch, room, case.heads).exp()
    count = torch.tensor([0, steps, *torch.randint(steps + 1, (case.batch,), generator=generator)][: case.batch])
    path = torch.stack([torch.randperm(room, generator=generator)[:steps] for _ in range(case.batch)])
    for row in range(case.batch):
        other = torch.ones(room, dtype=torch.bool)
        other[path[row, : count[row]]] = False
        for part in (key, value, decay):
            part[row, other] = torch.nan
    return [key.to(case.dtype), value, decay, path, count]


def _in_scratch(part: Tensor) -> Tensor:
    """The same in a memory that has room for more nodes of each row."""
    return torch.cat([part, torch.full_like(part[:, :1], torch.nan).expand(-1, 5, *part.shape[2:])], 1)[
        :, : part.shape[1]
    ]


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if value is None:
        return None
    return [function(x) for x in value] if isinstance(value, list) else function(value)


def _trees(batch: int, nodes: int, generator: torch.Generator) -> Tensor:
    """Ancestors [batch, node, node] bool of random parents: a chain in the first row."""
    ancestors = torch.eye(nodes, dtype=torch.bool).repeat(batch, 1, 1)
    for node in range(1, nodes):
        parents = torch.randint(max(0, node - 9), node, (batch,), generator=generator)  # near: deep trees
        parents[0] = node - 1
        ancestors[:, node] |= ancestors[torch.arange(batch), parents]
    return ancestors
