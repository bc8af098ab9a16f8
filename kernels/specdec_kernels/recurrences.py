"""What the ops of recurrences are given: what there are kernels for, and what fits together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_NODES = 64  # of a tree, and on a path that is folded

Fold = Sequence[Tensor]  # key, value, decay, path, count: what `fold_linear_attention` takes after the state
Parts = dict[str, Tensor]  # by name, [batch, node, ...], of the same nodes


def supports(state: Tensor, decay: Tensor, nodes: int, fold: Fold | None = None) -> bool:
    """Whether there is a kernel: for float32 states, decays by head, and up to MAX_NODES nodes, folded ones too."""
    most = max(nodes, 0 if fold is None else fold[3].shape[1])
    return state.dtype == torch.float32 and decay.dim() == 3 and most <= MAX_NODES


def check(op: str, state: Tensor, last: Parts, every: Parts, ancestors: Tensor | None, fold: Fold | None) -> None:
    """Raise ValueError unless all fits the state, [batch, head, dim, value_dim].

    Args:
        last: what is of the last nodes of a tree alone.
        every: what is of all its nodes.
        ancestors, fold: as for `specdec_kernels.reference.linear_attention`; None if there are none.
    """
    if state.dim() != 4:
        raise ValueError(f"{op}: state is {[*state.shape]}, not [batch, head, dim, value_dim].")
    folded: Parts = {} if fold is None else dict(zip(("key", "value", "decay"), fold[:3], strict=True))
    (batch, heads, *_), groups = state.shape, (*{**folded, **every}["key"].shape, 0, 0)[2]
    wrong = (
        []
        if groups and heads % groups == 0
        else [f"{heads} heads cannot share {groups} key heads evenly: repeat these"]
    )
    for parts, which in ((last, ""), (every, ""), (folded, "folded ")):
        wrong += [f"{which}{fault}" for fault in _faults(parts, state, groups)]
    if ancestors is not None:
        nodes = every["key"].shape[1]
        wrong += _fault("ancestors", ancestors, state, (batch, nodes, nodes))
    if fold is not None:
        wrong += [
            *_fault("path", fold[3], state, (batch, fold[3].shape[-1])),
            *_fault("count", fold[4], state, (batch,)),
        ]
    if wrong:
        raise ValueError(f"{op}: {'; '.join(wrong)}.")


def _faults(parts: Parts, state: Tensor, groups: int) -> Iterator[str]:
    batch, heads, dim, value_dim = state.shape
    tails = {"query": (groups, dim), "key": (groups, dim), "beta": (heads,)}
    for name, x in parts.items():
        tail = (heads, dim)[: x.dim() - 2] if name == "decay" else tails.get(name, (heads, value_dim))
        yield from _fault(name, x, state, (batch, next(iter(parts.values())).shape[1], *tail))


def _fault(name: str, x: Tensor, state: Tensor, shape: tuple[int, ...]) -> Iterator[str]:
    if x.shape != shape:
        yield f"{name} is {[*x.shape]}, not {[*shape]}"
    if x.device != state.device:
        yield f"{name} is on {x.device}, not on {state.device}: move it"
