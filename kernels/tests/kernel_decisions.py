"""Whether Triton's kernel of sibling rejection decides as torch does, on coins at the thresholds of torch's decisions.

    TRITON_INTERPRET=1 python kernels/tests/kernel_decisions.py 2000

Prints as JSON how many sets of coins were decided, and how many of them otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec import Law, Sampling
from specdec.coins import Purpose
from specdec.rules import SiblingRejection
from specdec.testing.fast_paths import ROUNDINGS, FastDecisions, Nodes, Thresholds, emitted_laws
from specdec.testing.hard_laws import IN_BFLOAT16, UNDERFLOW, hard_nodes

Kernel = Callable[..., Any]
_ULP = 2.0**-53
_OTHERS = 1 - 1e-4  # coins of the other children, far enough from 1 for rounding


def shapes() -> Iterator[Nodes]:
    """What is compared: every law, in float32, bfloat16 and float64."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        yield hard_nodes(3, Law.SAMPLED_THEN_TOP, 2, Sampling(1.0), dtype)
        yield hard_nodes(5, Law.WITHOUT_REPLACEMENT, 3, Sampling(0.05), dtype)
        yield hard_nodes(3, Law.IID, 2, Sampling(0.7, top_k=2), dtype)
        yield hard_nodes(3, Law.POINT, 2, Sampling(1.0), dtype)
    yield hard_nodes(3, Law.IID, 5, Sampling(1.0), torch.float32)
    yield hard_nodes(5, Law.WITHOUT_REPLACEMENT, 5, Sampling(1.0), torch.float32)
    yield hard_nodes(3, Law.WITHOUT_REPLACEMENT, 2, Sampling(1.0), torch.float32, UNDERFLOW)
    yield hard_nodes(3, Law.SAMPLED_THEN_TOP, 2, Sampling(1.0), torch.float32, IN_BFLOAT16)


def disagreements(kernel: Kernel, sets: int) -> Iterator[tuple[int, int]]:
    """(sets of coins decided, those decided otherwise) for every shape, of `sets` in all.

    The kernel's arithmetic is not torch's, so that its thresholds may lie elsewhere: by no more than the bound on the law,
    divided by the share of the law that a threshold decides. What torch accepts always or never, the kernel must at coins so
    far from 1 or 0.
    """
    compared = list(shapes())
    for hard in compared:
        decisions = FastDecisions(SiblingRejection(), hard)
        thresholds, room = _some(decisions, sets // len(compared) // 5)
        for by in (0.0, -_ULP, _ULP, -room, room):
            found = _of_kernel(kernel, decisions, thresholds, by)
            allowed = [_of_torch(decisions, thresholds, by + shift) for shift in (-room, 0 * room, room)]
            right = torch.stack([(found == each).all(1) for each in allowed]).any(0)
            yield len(right), int((~right).sum())


def _some(decisions: FastDecisions, count: int) -> tuple[Thresholds, Tensor]:
    """`count` of the thresholds whose share of the law is above rounding, and the room that each has."""
    nodes, found = decisions.nodes, emitted_laws(decisions.rule, decisions.nodes)[1]
    room = ROUNDINGS[nodes.logits.dtype] * nodes.logits.shape[1] / found.share
    # numbers of 16 bits below the least normal one are not converted rightly by Triton's interpreter
    broken = (nodes.weights > 0) & (nodes.weights < torch.finfo(nodes.weights.dtype).tiny)
    fits = ~broken.any(1) if nodes.weights.dtype.itemsize == 2 else torch.ones(len(broken), dtype=torch.bool)
    kept = ((room < 0.01) & fits[decisions.owner[found.draft]]).nonzero()[:, 0]
    kept = kept[torch.linspace(0, len(kept) - 1, min(count, len(kept))).long()]
    some = replace(found, **{name: value[kept] for name, value in vars(found).items()})
    return replace(some, coin=some.coin.clamp(2 * room[kept], 1 - 2 * room[kept])), room[kept]


def _of_torch(decisions: FastDecisions, thresholds: Thresholds, by: float | Tensor) -> Tensor:
    """[threshold, 2] int64: accepted node and token."""
    return torch.stack(decisions(thresholds.draft, *thresholds.coins(decisions.nodes.width, by, _OTHERS)), 1)


def _of_kernel(kernel: Kernel, decisions: FastDecisions, thresholds: Thresholds, by: float | Tensor) -> Tensor:
    accept, emit = thresholds.coins(decisions.nodes.width, by, _OTHERS)
    tree, _, coins = decisions.inputs(thresholds.draft, accept, emit)
    logits = decisions.nodes.logits[decisions.owner[thresholds.draft]][:, None].expand(-1, tree.tokens.shape[1], -1)
    drafted = tree.tokens, tree.topology.children, tree.laws, tree.draft_probs
    flips = coins.uniforms(Purpose.ACCEPT).contiguous(), coins.uniforms(Purpose.EMIT).contiguous()
    path, accepted, token, _ = kernel(logits, *drafted, *flips, 1, *decisions.nodes.sampling.filters, 1.0)
    return torch.stack([torch.where(accepted > 0, path[:, 1], 0), token], 1)


if __name__ == "__main__":
    import specdec_kernels.triton.verify as triton_verify

    torch.set_num_threads(1)
    found = list(disagreements(triton_verify.verify, int(sys.argv[1])))
    print(json.dumps({"sets": sum(count for count, _ in found), "otherwise": sum(wrong for _, wrong in found)}))
