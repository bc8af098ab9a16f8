"""What is timed of laws, verification and compaction: arguments, what computes them, and how far a result is off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from floors import Compaction, Laws
from torch import Tensor

import specdec_kernels
from specdec import Law, Topology
from specdec.laws import excludes_elders, is_random
from specdec_kernels.reference.compact import compact as compact_in_torch
from specdec_kernels.reference.law import probabilities
from specdec_kernels.reference.verify import verify as walk_in_torch
from specdec_kernels.reference.verify import walk

Arguments = tuple[Any, ...]  # of the op
Call = Callable[..., Any]
SAMPLINGS = {  # temperature, top-k, top-p, min-p
    "greedy": (0.0, None, None, None),
    "temperature": (0.7, None, None, None),
    "top-p": (0.7, None, 0.9, None),
    "top-k": (0.7, 50, None, None),
}
DOUBT = 0.1  # of the decisions may differ from float64's: each draws on a coin that may lie next to its threshold
DISTANCE = 1e-3  # of a law from float64's, sum over the vocabulary: a token at a threshold weighs less


def law_inputs(shape: Laws, device: str, seed: int) -> Arguments:
    """Logits [batch * node, vocab]."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(shape.batch * shape.nodes, shape.vocab, generator=generator, device=device) * 3
    return logits.bfloat16(), *SAMPLINGS[shape.sampling]


def verify_inputs(shape: Laws, device: str, seed: int) -> Arguments:
    """Trees drawn from laws that resemble the target's."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, nodes, vocab, width = shape.batch, shape.nodes, shape.vocab, shape.width

    def normal(count: int) -> Tensor:
        return torch.randn(batch, count, vocab, generator=generator, device=device)

    parents = torch.div(torch.arange(nodes, device=device) - 1, width, rounding_mode="floor").expand(batch, -1)
    topology, law = Topology(parents, shape.depth, width), Law[shape.children]
    logits = normal(nodes) * 3
    weights = (logits[:, : shape.internal] + normal(shape.internal)).softmax(-1)
    drawn = _drawn(law, weights.flatten(0, 1), width, generator).view(batch, shape.internal * width)
    tokens = torch.cat([drawn.new_zeros(batch, 1), drawn], 1)[:, :nodes].contiguous()
    laws = torch.full((batch, nodes), int(law), dtype=torch.uint8, device=device)
    coins = torch.rand(2, batch, nodes, dtype=torch.float64, generator=generator, device=device)
    drafted = tokens, topology.children, laws, weights if is_random(law, 0) else None
    return logits.bfloat16(), *drafted, *coins, shape.depth, *SAMPLINGS[shape.sampling], 1.0


def _drawn(law: Law, weights: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Children [node, width] int64 of nodes with laws `weights` [node, vocab]."""
    draws = sum(is_random(law, slot) for slot in range(width))
    top = weights.topk(width - draws).indices
    if draws == 0:
        return top
    drawn = torch.multinomial(weights.scatter(1, top, 0), draws, not excludes_elders(law), generator=generator)
    return torch.cat([drawn, top], 1)


def compact_inputs(shape: Compaction, device: str, seed: int, calls: int = 1) -> list[Arguments]:
    """Of `calls` calls on one cache, each on slots that no other touches."""
    generator, room = torch.Generator(device).manual_seed(seed), 8 * shape.kept
    size = 2 * shape.layers, shape.batch, calls * room, shape.kv_heads, shape.head_dim
    stack = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
    scores = torch.rand(shape.batch, room - 1, generator=generator, device=device)
    path = 1 + scores.topk(shape.kept - 1).indices.sort(1).values
    path = torch.nn.functional.pad(path, (1, 0))
    count = torch.full((shape.batch,), shape.kept, device=device)
    return [(stack, path, torch.full_like(count, room * call), count) for call in range(calls)]


def sorted_probabilities(logits: Tensor, temperature: float, top_k: None, top_p: float, min_p: None) -> Tensor:
    """The law [..., vocab] under temperature and top-p alone, by sorting every row."""
    ranked = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = ranked.values.cumsum(-1) - ranked.values
    kept = ranked.values.masked_fill(before >= top_p, 0)
    return torch.zeros_like(kept).scatter_(-1, ranked.indices, kept / kept.sum(-1, keepdim=True))


def sort_then_walk(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`verify` with the laws of all nodes sorted beforehand."""
    drafted: Any = arguments[1:8]
    laws = sorted_probabilities(arguments[0], *arguments[8:12])
    rows = torch.arange(len(laws), device=laws.device)
    return walk(lambda node: laws[rows, node], *drafted, lenience=arguments[12])


def compact_by_layer(stack: Tensor, path: Tensor, lengths: Tensor, count: Tensor) -> None:
    """Every key and value for itself."""
    for layer in stack:
        compact_in_torch(layer[None], path, lengths, count)


def candidates(shape: Laws | Compaction) -> dict[str, Call]:
    """What can compute this shape: the op, and rivals."""
    if isinstance(shape, Compaction):
        return {"specdec": specdec_kernels.compact, "torch": compact_in_torch, "torch by layer": compact_by_layer}
    ours, torchs, sort = (
        (specdec_kernels.law, probabilities, sorted_probabilities)
        if shape.op == "law"
        else (specdec_kernels.verify, walk_in_torch, sort_then_walk)
    )
    return {"specdec": ours, "torch": torchs, **({"torch sort": sort} if shape.sampling == "top-p" else {})}


def fault(shape: Laws | Compaction, call: Call, buffers: list[Arguments]) -> str | None:
    """What is wrong with a result, if anything is."""
    if isinstance(shape, Compaction):
        stack, path, lengths, count = buffers[0]
        found, due, end = stack.clone(), stack.clone(), int(lengths[0] + count[0])
        call(found, path, lengths, count)
        compact_in_torch(due, path, lengths, count)
        return None if torch.equal(found[:, :, :end], due[:, :, :end]) else "other states"
    if shape.op == "law":
        logits, *filters = buffers[0]
        distance = float(
            (_law_of(call(logits, *filters), logits, *filters) - probabilities(logits.double(), *filters))
            .abs()
            .sum(1)
            .max()
        )
        return None if distance < DISTANCE else f"off by {distance:.1e}, rounding by at most {DISTANCE:.0e}"
    otherwise = torch.cat([_otherwise(call(*b)[:3], walk_in_torch(b[0].double(), *b[1:])[:3]) for b in buffers])
    share = float(otherwise.float().mean())
    return (
        None
        if share <= DOUBT
        else f"{share:.0%} decided otherwise than in float64, rounding decides {DOUBT:.0%} at most"
    )


def _law_of(found: Any, logits: Tensor, temperature: float, *filters: Any) -> Tensor:
    """[row, vocab] in float64 from what `law` or `probabilities` returns."""
    if isinstance(found, Tensor):
        return found.double()
    (peak, cut, total), best, exact = found[0].unbind(1), found[1], logits.double()
    if temperature == 0:
        return torch.zeros_like(exact).scatter_(1, best[:, None], 1)
    weights = ((exact - peak[:, None]) / temperature).exp().where(exact >= cut[:, None], 0)
    return weights / total[:, None]


def _otherwise(found: tuple[Tensor, ...], due: tuple[Tensor, ...]) -> Tensor:
    """[batch] bool: rows in which (path, accepted, token) differ."""
    steps = min(found[0].shape[1], due[0].shape[1])
    kept = torch.arange(steps, device=due[1].device) <= due[1][:, None]
    elsewhere = ((found[0][:, :steps] != due[0][:, :steps]) & kept).any(1)
    return elsewhere | (found[1] != due[1]) | (found[2] != due[2])
