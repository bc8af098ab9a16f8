"""How long tree attention, and a whole step, should take by arithmetic. What it assumes was not measured here.

    python kernels/bench/estimates.py

prints the tables of `kernels/README.md`. A measurement that is far from its estimate says which assumption is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import verification_estimate
from floors import Shape

from specdec_kernels import plan
from specdec_kernels.backend import CHIPS, Chip
from specdec_kernels.configs import attention_config


class Assumed(NamedTuple):
    """By default of an H200. Products reach their rate when every multiprocessor holds as many programs as it can."""

    flops: float = 425e12  # bf16 products of Triton's kernels, which are seen to reach 400 to 450 of 790 a second
    bytes: float = 0.8 * 4.3e12  # of keys and values, by all multiprocessors together
    fetched: float = 64e9  # of these bytes, by one multiprocessor: what it has under way, 64 KB, every microsecond
    cached: float = 5.5e12  # bytes of partial results, which stay in the L2 cache
    launch: float = 1.5e-6  # seconds between two kernels of a graph
    overlapped: float = 0.5e-6  # the same, where the second may begin before the first has ended
    begin: float = 2e-6  # until a program's first product, and for its last writes: loads that wait for one another
    merge: float = 1e-6  # the same of a program that merges
    streamed: float = 4.3e12  # bytes of weights, by the best products of few tokens
    host: float = 8e-6  # of Python and PyTorch for an op that is not captured


ON_H200 = Assumed()


class Estimate(NamedTuple):
    """One call."""

    programs: int  # that have something to do
    waves: int
    busy: float  # `plan.busy`
    seconds: float


def tree_attention(
    shape: Shape, chip: Chip, capacity: int | None = None, splits: int | None = None, assumed: Assumed = ON_H200
) -> Estimate:
    """The sum of what waits for one another: the waves, each as long as its fullest program, and the merge.

    Every tile counts as one of the prefix. Products of a wave that is not full take no less time than those of a full one;
    its programs share the memory among fewer, as far as a multiprocessor takes more.

    Args:
        capacity: the bound on the length that the launch knows; by default the length itself.
        splits: how many there are; by default as planned.
    """
    rows = shape.nodes * shape.heads // shape.kv_heads
    config = attention_config(chip.arch, shape.head_dim, rows, 2)
    launch = chip.processors, shape.batch * shape.kv_heads, rows
    words = -(-shape.nodes // 32)
    count = splits or plan.splits(plan.grid(config, *launch, capacity or shape.length, words))
    grid = plan.grid(config, *launch, shape.seen - shape.nodes, words)
    programs, tile = grid.programs * plan.used(grid, count), 4 * config.block_n * shape.head_dim
    products = grid.at_once * tile * config.block_m / assumed.flops
    total = assumed.launch
    for at_work in plan.sizes(grid, count):
        rate = min(assumed.bytes, min(at_work, chip.processors) * assumed.fetched)
        total += assumed.begin + plan.share(grid, count) * max(products, at_work * tile / rate)
    if count > 1:
        parts = 4 * plan.used(grid, count) * shape.batch * shape.nodes * shape.heads * shape.head_dim
        total += 2 * parts / assumed.cached + (assumed.overlapped if chip.overlaps else assumed.launch) + assumed.merge
    return Estimate(programs, plan.waves(grid, count), plan.busy(grid, count), total)


class Decoder(NamedTuple):
    """A model, by default of the shape of Llama 3 8B; weights in 16 bits."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 14336
    vocab: int = 128256

    def bytes(self, shape: Shape) -> int:
        """Weights that a pass reads: all but the input embedding."""
        attention = self.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
        return 2 * (self.layers * (attention + 3 * self.hidden * self.inner) + self.vocab * self.hidden)


class Launches(NamedTuple):
    """Kernels of a step. Those of a layer beside products and attention: two norms with what is added to them, positions,
    writing of keys and of values, the activation, where a compiler fuses them."""

    products: int = 4  # of a layer, of joined weights
    others: int = 6  # of a layer
    decided: int = 70  # of deciding and committing, greedily, as counted in a run whose verification was left out


COMPILED, SEPARATE, CAPTURED = Launches(), Launches(products=7), Launches(products=7, others=35)


def step(shape: Shape, chip: Chip, launches: Launches, model: Decoder, assumed: Assumed = ON_H200) -> dict[str, float]:
    """Seconds of the parts of a captured step with a greedy tree that costs nothing to draft."""
    products = model.layers * launches.products + 1
    verified = sum(verification_estimate.parts(verification_estimate.KINDS[0], chip).values())
    return {
        "weights": model.bytes(shape) / assumed.streamed,
        "products' beginnings": products * (assumed.launch + assumed.begin),
        "attention": model.layers * tree_attention(shape, chip, assumed=assumed).seconds,
        "other kernels of layers": model.layers * launches.others * assumed.launch,
        "decision": launches.decided * assumed.launch + verified,
    }


# Ops of a decoder layer that a step without capture calls, and of what is around the layers, as counted on a CPU.
_OPS, _AROUND = 44, 40


def over_assisted(step_seconds: float, layers: int = 32, draft_layers: int = 6, drafted: int = 4) -> float:
    """How many times as fast captured steps are as transformers' assisted generation, which waits for the host.

    Both accept the same.
    Passes of the draft model are launches above all: a layer of it is small.

    Args:
        step_seconds: a captured step but for drafting.
        layers, draft_layers: of target and draft.
        drafted: tokens of the chain, each a pass of the draft.
    """
    host = (layers * _OPS + _AROUND + drafted * (draft_layers * _OPS + _AROUND)) * ON_H200.host
    of_a_layer = COMPILED.products + COMPILED.others + 2  # with attention and its merge
    captured = drafted * (draft_layers * of_a_layer + _AROUND) * ON_H200.launch
    return max(host, step_seconds) / (step_seconds + captured)


def page() -> str:
    """What `kernels/README.md` says of whole steps."""
    shape, model = Shape("Llama-3-8B", 32, 8, 128, 64, 1024, 1), Decoder()
    floor = model.bytes(shape) / ON_H200.streamed
    kinds = {"compiled, weights joined": COMPILED, "compiled": SEPARATE, "captured as it stands": CAPTURED}
    steps = {name: step(shape, CHIPS["sm_90"], launches, model) for name, launches in kinds.items()}
    parts = list(steps["compiled"])
    lines = [f"| {' | '.join(['ms', *parts, 'together', 'of reading the weights'])} |", "|---" * (len(parts) + 3) + "|"]
    for name, found in steps.items():
        cells = [*(f"{1e3 * found[part]:.2f}" for part in parts), f"{1e3 * sum(found.values()):.1f}"]
        lines.append(f"| {' | '.join([name, *cells])} | {sum(found.values()) / floor:.2f} |")
    joined = sum(steps["compiled, weights joined"].values())
    over = f"Over transformers' assisted generation with chains of 4, which waits for the host: {over_assisted(joined):.1f}."
    decisions = (
        "Laws, verification and a token of 64 nodes with 128k logits each, of which a greedy step has the first:"
    )
    return "\n".join([*lines, "", over, "", decisions, "", verification_estimate.table(CHIPS["sm_90"])])


if __name__ == "__main__":
    print(page())
