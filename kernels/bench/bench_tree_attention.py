"""Times tree attention beside its floor and its rivals on a GPU: `make gpu` runs it after the tests.

python kernels/bench/bench_tree_attention.py --seconds 300
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import processes
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
DRY = [Shape("dry", 4, 2, 16, nodes, 140, 1) for nodes in (5, 33)]
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


def shapes_of(method: str, dry: bool) -> list[Shape]:
    """The rivals have neither windows nor softcaps."""
    every = DRY if dry else shapes()
    return [shape for shape in every if method == processes.OURS or (shape.softcap is None and shape.window is None)]


def figures(shape: Shape, method: str, device: str) -> dict[str, Any]:
    """Of calls that go through several caches in turn; raises if a result is wrong or refused."""
    turns = buffers(shape, device)
    return checked_figures(shape, candidates()[method](turns[0]), turns, device)


def checked_figures(shape: Shape, call: Call, turns: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Of calls with each of `turns`; raises if the first result is wrong."""
    found = error(call, turns[0])
    if not found < TOLERANCE:
        raise RuntimeError(f"wrong: error {found:.1e}, at most {TOLERANCE:.0e} is rounding")
    timing = report.measure([lambda b=b: call(b) for b in turns], device)
    return {"error": found, **report.figures(shape, timing)}


def buffers(shape: Shape, device: str) -> list[dict[str, Any]]:
    """Arguments of as many calls as go through `ROTATED` bytes, at least 4."""
    if device != "cuda":
        return [inputs(shape, device, seed) for seed in range(2)]
    count = max(4, math.ceil(ROTATED / shape.cache_bytes))
    if count * shape.cache_bytes > LARGEST * torch.cuda.mem_get_info()[0]:
        raise MemoryError(f"{count} caches of {shape.cache_bytes / 1e9:.1f} GB do not fit")
    return [inputs(shape, device, seed) for seed in range(count)]


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


def candidates() -> dict[str, Any]:
    """What can compute tree attention: the op, and rivals."""
    return {processes.OURS: lambda arguments: lambda a: tree_attention(**a)[0], **BASELINES}


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


BENCHMARK = processes.Benchmark(
    __file__,
    "kernels_{gpu}_{date}_tree_attention",
    ("tree_attention",),
    (processes.OURS, *BASELINES),
    shapes_of,
    figures,
    {},
)

if __name__ == "__main__":
    processes.main(BENCHMARK, 300)
