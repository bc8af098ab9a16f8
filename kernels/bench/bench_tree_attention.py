"""Times tree attention beside its floor and its rivals on a GPU: experiments/gpu.sh runs it after the tests.

python kernels/bench/bench_tree_attention.py --tests outputs/gpu_tests --seconds 300
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import report
import torch
from baselines import BASELINES, Call
from floors import Shape

from specdec_kernels import tree_attention
from specdec_kernels.reference import tree_attention as reference

LLAMA3, LLAMA2, QWEN25 = ("Llama-3-8B", 32, 8, 128), ("Llama-2-7B", 32, 32, 128), ("Qwen2.5-7B", 28, 4, 128)
GEMMA2 = ("Gemma-2-9B", 16, 8, 256)
ROTATED = 200 << 20  # bytes of keys and values that calls go through in turn: several times an L2 cache
LARGEST = 0.5  # of the free memory that one shape may take
TOLERANCE = 8e-3  # relative error against float64 in bfloat16, norm over norm: see kernels/tests/attention_cases.py


def shapes() -> Iterator[Shape]:
    """The most telling first: what time does not suffice for is left out and named."""
    lengths = (8192, 32768, 1024, 131072)
    yield from (Shape(*LLAMA3, nodes, length, 1) for length in lengths for nodes in (64, 16))
    for model in (LLAMA2, QWEN25):
        yield Shape(*model, 64, 8192, 1)
    yield Shape(*GEMMA2, 64, 8192, 1, softcap=50.0)
    yield Shape(*GEMMA2, 64, 8192, 1, softcap=50.0, window=4096)
    for batch, counts in ((1, (1, 256)), (8, (64, 16, 1, 256)), (64, (64, 16, 1, 256))):
        yield from (Shape(*LLAMA3, nodes, length, batch) for nodes in counts for length in lengths)


def main() -> None:
    chosen = report.asked(300, "tree_attention")
    source, began, rows, left, path = report.provenance(), time.monotonic(), [], [], None
    for shape in shapes():
        buffers = max(4, math.ceil(ROTATED / shape.cache_bytes))
        fits = buffers * shape.cache_bytes < LARGEST * torch.cuda.mem_get_info()[0]
        if fits and time.monotonic() - began <= chosen.seconds:
            rows += time_shape(shape, [inputs(shape, "cuda", seed) for seed in range(buffers)])
            torch.cuda.empty_cache()
        else:
            left.append(f"{asdict(shape)}: {'time' if fits else 'memory'}")
        notes = {**source, "left out": left}
        path = report.write(rows, notes, chosen.results, "kernels_{gpu}_{date}_tree_attention")  # now: time may run out
    print(path)
    report.require_ours(rows)


def inputs(shape: Shape, device: str, seed: int) -> dict[str, Any]:
    """The op's arguments: a random tree after a prefix, in the cache's memory layout."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, nodes = shape.batch, shape.nodes

    def normal(count: int, heads: int) -> torch.Tensor:
        made = torch.randn(
            batch, count, heads, shape.head_dim, generator=generator, device=device, dtype=torch.bfloat16
        )
        return made.transpose(1, 2)

    tree = torch.rand(nodes, nodes, generator=generator, device=device).lt(0.2).tril(-1)
    tree |= torch.eye(nodes, dtype=torch.bool, device=device)
    first = 0 if shape.window is None else max(shape.length - shape.window, 0)
    return {
        "query": normal(nodes, shape.heads),
        "key": normal(shape.length + nodes, shape.kv_heads),
        "value": normal(shape.length + nodes, shape.kv_heads),
        "first": torch.full((batch, nodes), first, dtype=torch.int32, device=device),
        "lengths": torch.full((batch,), shape.length, dtype=torch.int32, device=device),
        "ancestors": reference.pack(tree).expand(batch, -1, -1).contiguous(),
        "softcap": shape.softcap,
    }


def candidates(shape: Shape) -> dict[str, Any]:
    """What can compute this shape: the op, and rivals where there is neither window nor softcap."""
    rivals = BASELINES if shape.softcap is None and shape.window is None else {}
    return {"specdec": lambda arguments: lambda a: tree_attention(**a)[0], **rivals}


def time_shape(shape: Shape, buffers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each candidate; one that is wrong or refuses has a reason in place of figures."""
    rows = []
    for name, prepare in candidates(shape).items():
        row = {**asdict(shape), "method": name}
        try:
            call = prepare(buffers[0])
            row["error"] = error(call, buffers[0])
            if not row["error"] < TOLERANCE:
                raise RuntimeError(f"wrong: error {row['error']:.1e}, at most {TOLERANCE:.0e} is rounding")
            row |= report.figures(shape, report.measure([lambda b=b, call=call: call(b) for b in buffers]))
        except Exception as refusal:  # rivals refuse shapes, masks and devices by raising; ours must not: see main
            row["reason"] = report.reason(refusal)
        rows.append(row)
        print({k: v for k, v in row.items() if v is not None}, flush=True)
    return rows


def error(call: Call, arguments: dict[str, Any]) -> float:
    """Of the first row of the batch and the first KV head's group, relative to float64."""
    groups = arguments["query"].shape[1] // arguments["key"].shape[1]
    some = {n: x[:1] if torch.is_tensor(x) else x for n, x in arguments.items()}
    some |= {"query": some["query"][:, :groups], "key": some["key"][:, :1], "value": some["value"][:, :1]}
    exact: dict[str, Any] = {
        n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in some.items()
    }
    right = reference.tree_attention(**exact)[0]
    return float((call(arguments)[:1, :, :groups].double() - right).norm() / right.norm())


if __name__ == "__main__":
    main()
