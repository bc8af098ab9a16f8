"""Random inputs of tree attention, ragged and poisoned, for every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from specdec_kernels.reference import tree_attention as reference

# Relative error of the output, norm over norm, against the specification in float64 on the same (rounded) inputs: inputs,
# weights and outputs are rounded to the dtype, sums are not. Measured in the interpreter: 4e-7, 3e-4, 3e-3. Tensor cores cut
# their sums off where it rounds, a unit in the last place a step: by that float32 heads of 256 may be off by 2e-6 there. One
# product of tf32 in place of three would be off by 3e-4.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}  # absolute: scores are never rounded


@dataclass(frozen=True)
class Case:
    """What to draw. The first row of a batch has `length` committed slots, the others fewer; one has none."""

    nodes: int
    length: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int | None = None
    batch: int = 1
    earlier: int = 0  # nodes of the tree before those asked about
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    splits: int | None = None

    def __str__(self) -> str:
        set_to = {name: value for name, value in vars(self).items() if value != type(self).__dict__.get(name, 0)}
        return "_".join(f"{name}{value}" for name, value in set_to.items()).replace("torch.", "")


def draw(case: Case, seed: int, device: str = "cpu") -> dict:
    """The arguments of the op: a random forest over the prefix, slots after the tree full of NaN, memory as in the cache."""
    generator = torch.Generator().manual_seed(seed)
    batch, nodes, total = case.batch, case.nodes, case.nodes + case.earlier
    lengths = torch.tensor([case.length, 0, *torch.randint(case.length + 1, (batch,), generator=generator)][:batch])
    lengths = lengths.to(torch.int32)
    ancestors, depths = _tree(batch, total, generator)
    first = (lengths[:, None] + depths - (case.window or 1 << 30) + 1).to(torch.int32)
    near = depths[:, :, None] - depths[:, None] < (case.window or 1 << 30)
    query, key, value = (
        torch.randn(batch, count, heads, dim, generator=generator)
        for count, heads, dim in (
            (nodes, case.heads, case.head_dim),
            (case.length + total + 7, case.kv_heads, case.head_dim),
            (case.length + total + 7, case.kv_heads, case.value_dim or case.head_dim),
        )
    )
    for row, length in enumerate(lengths.tolist()):
        key[row, length + total :] = value[row, length + total :] = torch.nan
    query, key, value = (x.to(device, case.dtype).transpose(1, 2) for x in (query, key, value))
    return {
        "query": query,
        "key": key,
        "value": value,
        "first": first[:, -nodes:].to(device),
        "lengths": lengths.to(device),
        "ancestors": reference.pack(ancestors & near)[:, -nodes:].to(device),
        "scale": None,
        "softcap": case.softcap,
        "sinks": torch.randn(case.heads, generator=generator).to(device) if case.sinks else None,
    }


def assert_right(arguments: dict, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Output and log-sum-exp are those of the specification in float64."""
    exact: dict[str, Any] = {
        n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in arguments.items()
    }
    out, lse = reference.tree_attention(**exact)
    dtype = arguments["query"].dtype
    assert found[0].dtype == dtype and found[0].shape == out.shape and found[1].shape == lse.shape
    error = float((found[0].double() - out).norm() / out.norm())
    assert error < TOLERANCE[dtype], f"output off by {error:.1e}, at most {TOLERANCE[dtype]:.0e} is rounding"
    off = float((found[1].double() - lse).abs().max())
    assert off < LSE_TOLERANCE[dtype], f"log-sum-exp off by {off:.1e}, at most {LSE_TOLERANCE[dtype]:.0e} is rounding"


def _tree(batch: int, nodes: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random parents; ancestors [batch, node, node] bool and depths [batch, node]."""
    ancestors = torch.eye(nodes, dtype=torch.bool).repeat(batch, 1, 1)
    for node in range(1, nodes):
        parents = torch.randint(max(0, node - 9), node, (batch,), generator=generator)  # near: deep trees
        ancestors[:, node] |= ancestors[torch.arange(batch), parents]
    return ancestors, ancestors.sum(-1) - 1
