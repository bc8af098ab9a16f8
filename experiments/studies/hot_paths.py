"""Times on the CPU of what is our own in a step: sampling laws, rules, products and attention of compiled forward passes, and
nodes of a tree in models with recurrent state.

    python -m experiments.studies.hot_paths --rounds 15 --output experiments/results/hot_paths_cpu.json

Laws are compared with transformers' warpers, rules with token-level rejection of the same trees, products with reading the
matrices, attention with reading keys and values, each round in the fastest of the ways of `specdec.tuning.reading`, and
nodes of recurrences with one token through transformers.
Everything is run once per round; figures are medians over the rounds, ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from experiments.bench import recurrent
from experiments.bench.report import markdown
from experiments.bench.results import Json, provenance
from specdec import Coins, DraftTree, Law, Sampling, rules
from specdec.batch import Batch
from specdec.coins import Purpose
from specdec.rules import Rule
from specdec.target_law import LogitsLaw
from specdec.tree import chain
from specdec.trees import Chain, TreePolicy, Widths
from specdec.trees.base import grow_tree
from specdec.tuning import reading
from specdec_kernels import attention, linear
from specdec_kernels.reference.tree_attention import pack

LAWS: dict[str, tuple[Sampling, Any]] = {
    "temperature 0.7": (Sampling(0.7), None),
    "top-k 50": (Sampling(1.0, top_k=50), TopKLogitsWarper(50)),
    "top-p 0.9": (Sampling(1.0, top_p=0.9), TopPLogitsWarper(0.9)),
    "min-p 0.05": (Sampling(1.0, min_p=0.05), MinPLogitsWarper(0.05)),
}
ROWS, LAW_VOCAB = 64, 128_000
BATCHES = [(1, 32_000), (8, 4_096), (8, 32_000)]
SHAPES = {"chain of 4": Chain(4), "tree 4-2-1, IID": Widths((4, 2, 1), Law.IID), "tree 4-2-1": Widths((4, 2, 1))}
NOISE = 1.0  # standard deviation between target and draft logits: about 0.6 of the drafted tokens are accepted
MATRICES = [(2560, 256), (256, 2560), (4096, 4096)]  # of the enlarged demo target, and of an 8B model
TOKENS = (1, 3, 4, 5, 8, 16, 24)
CACHES = [(1, 4, 2, 64, 261), (8, 4, 2, 64, 261), (1, 32, 8, 128, 1029), (1, 32, 8, 128, 8197)]
QUERIES = (1, 5, 16)
READ = 1 << 28  # bytes of matrices, or of keys and values, that are gone through: many times the cache
Timed = dict[str, Callable[[], Any]]


def laws() -> Timed:
    """Ours and the stock one for every truncation."""
    logits = torch.randn(ROWS, LAW_VOCAB) * 3
    timed: Timed = {}
    for name, (sampling, warper) in LAWS.items():
        timed[f"{name} | specdec"] = lambda sampling=sampling: sampling.probabilities(logits)
        if warper is not None:
            timed[f"{name} | transformers"] = lambda warper=warper: warper(None, logits.clone()).softmax(-1)
    return timed


def decisions(batch: int, vocab: int, tree: TreePolicy) -> Timed:
    """The fast path of every rule that admits such trees."""
    sampling = Sampling(1.0)
    drafted, logits, texts = draft(batch, vocab, tree, sampling)
    coins, timed = Coins(1, batch, drafted.tokens.shape[1]), {}
    coins.uniforms(Purpose.ACCEPT)  # tabulated for several steps at once: no part of a decision
    for rule in (getattr(rules, name)() for name in rules.__all__ if name not in ("Rule", "Decision", "Decisions")):
        try:
            rule.check(tree.spec(sampling))
        except ValueError:
            continue
        timed[type(rule).__name__] = lambda rule=rule: decide(rule, drafted, logits, texts, coins)
    return timed


def draft(batch: int, vocab: int, tree: TreePolicy, sampling: Sampling) -> tuple[DraftTree, Tensor, Batch]:
    """Trees of random laws, and a target's logits not far from the draft's."""
    texts = Batch(batch, 64, vocab, torch.device("cpu"))
    texts.sampling, texts.max_depth = sampling, 64
    texts.lengths += 1
    texts.left += 65
    asked: list[Tensor] = []

    def score(frontier: Any) -> Tensor:
        asked.append(torch.randn(batch, frontier.tokens.shape[1], vocab) * 3)
        return asked[-1]

    grown = grow_tree(tree.start(texts), Coins(0, batch, 64), tree.spec(sampling).nodes, score)
    scores = torch.cat(asked, 1)
    near = scores.gather(1, grown.asked.clamp(min=0, max=scores.shape[1] - 1)[..., None].expand(-1, -1, vocab))
    return grown.tree, near + NOISE * torch.randn(near.shape), texts


def decide(rule: Rule, tree: DraftTree, logits: Tensor, texts: Batch, coins: Coins) -> Any:
    return rule.decide_batch(tree, LogitsLaw(logits, tree, texts), coins)


def readings(tensors: list[Tensor]) -> Timed:
    return {f"reading | {way}": run for way, run in reading.ways(tensors).items()}


def products(rows: int, columns: int) -> Timed:
    """Matrices times a few tokens, and what any way to do it must take: reading them."""
    weights = [torch.randn(rows, columns) for _ in range(READ // (4 * rows * columns))]
    ways = {"specdec": linear, "torch": torch.nn.functional.linear}
    timed = readings(weights)
    for count in TOKENS:
        x = torch.randn(count, columns)
        for name, way in ways.items():
            timed[f"{count} | {name}"] = lambda way=way, x=x: [way(x, weight) for weight in weights]
    return timed


def attentions(batch: int, heads: int, kv_heads: int, dim: int, slots: int) -> Timed:
    """A few nodes after a text, layer after layer, as keys and values lie in our caches; and reading those."""
    shape = 2, batch, slots, kv_heads, dim
    layers = [torch.randn(shape) for _ in range(READ // (4 * math.prod(shape)))]
    timed = readings(layers)
    for count in QUERIES:
        query = torch.randn(batch, count, heads, dim).transpose(1, 2)
        tree = chain(batch, count).ancestors
        bias = torch.zeros(batch, 1, count, slots)
        bias[..., -count:].masked_fill_(~tree[:, None], -torch.inf)
        first, lengths = torch.zeros(batch, count, dtype=torch.int32), torch.full((batch,), slots - count).int()
        ways: dict[str, Any] = {
            "specdec": partial(attention, first=first, lengths=lengths, ancestors=pack(tree)),
            "torch": partial(scaled_dot_product_attention, attn_mask=bias, enable_gqa=True),
        }
        for name, way in ways.items():
            timed[f"{count} | {name}"] = lambda way=way, query=query: [
                way(query, *layer.transpose(2, 3)) for layer in layers
            ]
    return timed


def measure(timed: Timed, rounds: int, base: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the median ratio with the quartiles, over interleaved rounds.

    A ratio is to what is called `base`, or to the fastest in its round of all whose names begin so.
    """
    times: dict[str, list[float]] = {name: [] for name in timed}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, run in timed.items():
                began = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - began) * 1e3)
    seconds = {name: np.array(values[1:]) for name, values in times.items()}
    reference = np.min([values for name, values in seconds.items() if name.startswith(base)], axis=0)
    found = {}
    for name, values in seconds.items():
        low, ratio, high = np.percentile(values / reference, [25, 50, 75])
        found[name] = {"ms": float(np.median(values)), "ratio": ratio, "ratio_low": low, "ratio_high": high}
    return found


def table(title: str, found: dict[str, dict[str, float]]) -> str:
    rows = [
        [name, f"{row['ms']:.2f}", f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"]
        for name, row in found.items()
    ]
    return f"\n{title}\n\n{markdown([['', 'ms', 'ratio (quartiles)'], *rows])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="a part of the titles of the tables that are made")
    parser.add_argument("--output", default="outputs/hot_paths.json", help="where the figures go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    jobs = {f"law of {ROWS} x {LAW_VOCAB:,}": (laws, "top-p 0.9 | specdec")}
    for name in ("gated_delta_rule", "state_space", "whole_model"):
        jobs[f"recurrent: {name}"] = (getattr(recurrent, name), "one token | transformers")
    for rows, columns in MATRICES:
        jobs[f"tokens times {rows} x {columns}, {READ >> 20} MB"] = (partial(products, rows, columns), "reading")
    for sizes in CACHES:
        batch, heads, kv_heads, dim, slots = sizes
        title = f"attention to {slots:,} slots, batch {batch}, {heads} heads of {dim} over {kv_heads}, {READ >> 20} MB"
        jobs[title] = (partial(attentions, *sizes), "reading")
    for (batch, vocab), (shape, tree) in ((b, s) for b in BATCHES for s in SHAPES.items()):
        title = f"{shape}, batch {batch}, vocabulary {vocab:,}"
        jobs[title] = (partial(decisions, batch, vocab, tree), "SiblingRejection")
    jobs = {title: job for title, job in jobs.items() if options.only in title}
    source, found = provenance("experiments/studies/hot_paths.py", [], vars(options), "cpu"), {}
    for title, (make, base) in tqdm(jobs.items(), leave=False):
        found[title] = measure(make(), options.rounds, base)
        tqdm.write(table(title, found[title]))
    print("\n" + Json(options.output).write({**source, "figures": found}))


if __name__ == "__main__":
    main()
