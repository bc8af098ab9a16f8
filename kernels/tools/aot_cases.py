"""What the gate compiles: for each op a list of launches. To add an op, add its list to CASES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from specdec_kernels.configs import attention_config
from specdec_kernels.triton.compact import compact
from specdec_kernels.triton.gated_delta import gated_delta
from specdec_kernels.triton.law import law
from specdec_kernels.triton.linear_attention import fold_linear_attention, linear_attention
from specdec_kernels.triton.stored_linear import stored_linear
from specdec_kernels.triton.tree_attention import tree_attention
from specdec_kernels.triton.verify import verify

VOCAB = 128256  # of Llama 3
Filters = tuple[float, int | None, float | None, float | None]  # temperature, top-k, top-p, min-p

MMA = {"sm_80": "HMMA", "sm_90": "HMMA", "sm_100": "HMMA", "gfx942": "v_mfma"}  # one warp's tensor core instruction
INTEGERS = {**MMA, "sm_80": "IMMA", "sm_90": "IGMMA", "sm_100": "UTC"}
WIDE = {**MMA, "sm_90": "HGMMA", "sm_100": "UTC"}  # that of a warp group, from 64 rows on
PREFETCH = {"sm_80": "LDGSTS", "sm_90": "LDGSTS", "sm_100": "LDGSTS"}  # what is read next is on its way already
ORDERED = dict.fromkeys(PREFETCH, "MEMBAR")  # what a program stored is there for whoever sees that it arrived


class Launch(NamedTuple):
    """One launch of one op on CPU tensors, under the name its budget has."""

    name: str
    run: Callable[[], object]
    kernel: str  # the kernel that must have the instructions
    needs: tuple[Mapping[str, str], ...] = ()  # by arch, prefixes of instructions; archs that are not there need none
    quick: bool = False  # belongs to the set that is compiled with every change
    resident: Callable[[str], int] = lambda arch: 1  # how many of its programs a multiprocessor must hold


def _attention(nodes, head_dim, value_dim=None, dtype=torch.bfloat16, heads=32, kv_heads=8, softcap=None, sinks=False):
    value_dim, words = value_dim or head_dim, (nodes + 31) // 32
    query, key, value = (
        torch.empty(1, count, h, dim, dtype=dtype).transpose(1, 2)
        for count, h, dim in ((nodes, heads, head_dim), (8192, kv_heads, head_dim), (8192, kv_heads, value_dim))
    )
    bounds = torch.zeros(1, nodes, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    ancestors = torch.zeros(1, nodes, words, dtype=torch.int32)
    tree_attention(query, key, value, *bounds, ancestors, None, softcap, torch.empty(heads) if sinks else None)


def _resident(rows: int, dim: int, element_size: int, arch: str) -> int:
    return attention_config(arch, dim, rows, element_size).resident


def _tree_attention() -> list[Launch]:
    tma = {"sm_90": "UTMALDG", "sm_100": "UTMALDG"}
    cases = [
        Launch(
            f"tree_attention rows{4 * nodes} head_dim{head_dim}{' softcap sinks' if capped else ''}",
            partial(_attention, nodes, head_dim, softcap=50.0 if capped else None, sinks=capped),
            "tree_attention_kernel",
            (MMA if nodes == 4 else WIDE, tma),
            quick=(head_dim == 128 and not capped) or (nodes, head_dim, capped) == (16, 256, True),
            resident=partial(_resident, 4 * nodes, head_dim, 2),
        )
        for head_dim in (64, 128, 256)
        for nodes in (4, 16, 64)
        for capped in (False, True)
    ]
    cases += [
        Launch(
            f"tree_attention rows64 head_dim{dims}",
            partial(_attention, 16, *dims),
            "tree_attention_kernel",
            (WIDE, tma),
            resident=partial(_resident, 64, padded, 2),
        )
        for dims, padded in (((80, 80), 128), ((192, 128), 256))
    ]
    return cases + [
        Launch(
            f"tree_attention float32 head_dim{d}",
            partial(_attention, 4, d, dtype=torch.float32),
            "tree_attention_kernel",
            resident=partial(_resident, 16, d, 4),
        )
        for d in (64, 128, 256)
    ]


def _verify(dtype: torch.dtype, draft: bool, width: int, filters: Filters) -> None:
    integers, coins = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.float64)
    children, laws = torch.zeros(2, 8, width, dtype=torch.int64), integers.to(torch.uint8)
    draft_probs = torch.empty(2, 3, VOCAB) if draft else None
    verify(
        torch.empty(2, 8, VOCAB, dtype=dtype),
        integers,
        children,
        laws,
        draft_probs,
        coins,
        coins,
        3,
        *filters,
        lenience=1.0,
    )


def _verification() -> list[Launch]:
    plain, greedy, filtered = (1.0, None, None, None), (0.0, None, None, None), (0.7, 50, 0.9, 0.1)
    rows, tree, count = (
        torch.empty(4, VOCAB, dtype=torch.bfloat16),
        torch.zeros(2, 64, dtype=torch.int64),
        torch.zeros(2).long(),
    )
    stack = torch.empty(64, 2, 128, 8, 128, dtype=torch.bfloat16)
    return [
        Launch("verify", partial(_verify, torch.bfloat16, True, 4, plain), "_emit_kernel", (ORDERED,), quick=True),
        Launch("verify width16", partial(_verify, torch.bfloat16, True, 16, plain), "_reject_kernel"),
        Launch("verify points", partial(_verify, torch.float32, False, 4, plain), "_reject_kernel", quick=True),
        Launch("verify greedy", partial(_verify, torch.bfloat16, False, 4, greedy), "_reject_kernel"),
        Launch("verify float64", partial(_verify, torch.float64, True, 4, filtered), "_reject_kernel"),
        *(
            Launch(f"law {name}", partial(law, rows, temperature, top_k, top_p, None), kernel, quick=name == "top-p")
            for name, temperature, top_k, top_p, kernel in (
                ("greedy", 0.0, None, None, "_tile_kernel"),
                ("top-k", 0.7, 50, None, "_filter_kernel"),
                ("top-p", 0.7, None, 0.9, "_filter_kernel"),
            )
        ),
        Launch("law filtered", partial(law, rows, *filtered), "_filter_kernel", (ORDERED,), quick=True),
        Launch("compact", partial(compact, stack, tree[:, :8], count, count), "_compact_kernel", quick=True),
    ]


def _recurrence(op: str, nodes: int, dtype: torch.dtype = torch.float32, steps: int = 8) -> None:
    """In the sizes of Qwen3-Next and Mamba-2. What is kept of nodes is in float32, as states are, whatever inputs are in."""
    heads, groups, dim, value_dim = (64, 8, 128, 64) if op == "linear_attention" else (32, 16, 128, 128)
    query, key = torch.empty(1, nodes, groups, dim, dtype=dtype), torch.empty(1, nodes, groups, dim)
    value, update = torch.empty(1, nodes, heads, value_dim, dtype=dtype), torch.empty(1, nodes, heads, value_dim)
    decay, beta = torch.empty(1, nodes, heads), torch.empty(1, nodes, heads, dtype=dtype)
    state, ancestors = torch.empty(1, heads, dim, value_dim), torch.zeros(1, nodes, nodes, dtype=torch.bool)
    fold = key, update, decay, torch.zeros(1, steps, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    if op == "gated_delta":
        gated_delta(query, key, value, decay, beta, state, ancestors, update, fold)
    elif op == "linear_attention":
        linear_attention(query, key, update, decay, state, ancestors, fold)
    else:
        fold_linear_attention(state, *fold)


def _recurrences() -> list[Launch]:
    kernels = {"gated_delta": "_gated_delta_kernel", "linear_attention": "_linear_attention_kernel"}
    cases = [
        Launch(
            f"{op} nodes{nodes}{' bfloat16' if dtype == torch.bfloat16 else ''}",
            partial(_recurrence, op, nodes, dtype),
            kernel,
            (MMA if nodes == 16 or op == "gated_delta" else WIDE, PREFETCH),
            quick=nodes == 16 and dtype == torch.float32,
        )
        for op, kernel in kernels.items()
        for nodes in (16, 64)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    cases += [Launch(f"{op} long path", partial(_recurrence, op, 64, steps=64), kernels[op]) for op in kernels]
    fold = partial(_recurrence, "fold_linear_attention", 8)
    return [*cases, Launch("fold_linear_attention", fold, "_fold_kernel", (MMA, PREFETCH), quick=True)]


def _stored(name: str, tokens: int) -> None:
    """A matrix of the MLP of Llama 3 8B."""
    groups, tiles = 4096 // 32, 14336 // 16
    stored = {
        "int8": (torch.empty(tiles, 8 * groups, 16, 4, dtype=torch.uint8), torch.empty(tiles, 16)),
        "int4": (torch.empty(tiles, groups, 4, 16, 4, dtype=torch.uint8), torch.empty(tiles, groups, 2, 16).half()),
    }
    stored_linear(torch.empty(tokens, 4096), *stored[name], 14336)


def _stored_products() -> list[Launch]:
    return [
        Launch(
            f"linear_{name} tokens{tokens}",
            partial(_stored, name, tokens),
            "_stored_kernel",
            (INTEGERS, PREFETCH),
            quick=(name, tokens) == ("int4", 64),
        )
        for name in ("int8", "int4")
        for tokens in (16, 64)
    ]


CASES = [*_tree_attention(), *_verification(), *_recurrences(), *_stored_products()]
