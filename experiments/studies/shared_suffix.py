"""What samples of one prompt, and epochs, have to draft from each other: `SuffixDrafter()` and `SuffixDrafter(shared=True)`.

    python -m experiments.studies.shared_suffix   # minutes

Several samples of each demo prompt from the demo target, at once (a batch) and one after another, epoch after epoch with other
seeds. Counts of steps, no times. Writes `experiments/results/shared_suffix.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import specdec
from experiments.bench.prompts import demo
from experiments.bench.report import markdown
from experiments.bench.results import ROOT, provenance
from specdec import Sampling
from specdec.drafters import Drafter, SuffixDrafter
from specdec.trace.trace import Step

TASKS = ("functions", "docstrings", "tests", "prose")
HEAD = """# Samples of one prompt that draft from each other

{samples} samples of each of {prompts} demo prompts ({per_task} of each task) from the demo target, {new_tokens} tokens each, no
stop tokens; every epoch has a seed of its own, and the same weights. "At once": the samples of a prompt are one batch. "In
turn": they are decoded one after another, so each can draft from all before it. Without sharing, the second epoch only has
other seeds.

- acceptance length: tokens per step of a text.
- steps: target forwards of all batches. At once, a batch goes on until its last text ends.
- nodes: scored per step and text, roots and padding to the largest tree of the batch included.

`python -m experiments.studies.shared_suffix`, commit {commit}; {versions}; {date}. One thread of {cpu}.

{tables}
"""


def steps(
    target: Any, drafter: Drafter | None, texts: list[list[Tensor]], first: int, **options: Any
) -> Iterator[Step]:
    """The steps of batches that are decoded one after another; the first prompt of all has the index `first`."""
    for batch in texts:
        yield from specdec.generate(target, batch, drafter, stop_tokens=(), first_index=first, **options).trace.steps
        first += len(batch)


def counts(found: list[Step]) -> list[str]:
    """Acceptance length, steps, and nodes."""
    running = [sum(n > 0 for n in step.emitted) for step in found]
    tokens = sum(sum(step.emitted) for step in found)
    nodes = sum(step.nodes * rows for step, rows in zip(found, running, strict=True))
    return [f"{tokens / sum(running):.3f}", str(len(found)), f"{nodes / sum(running):.1f}"]


def table(target: Any, prompts: list[Tensor], samples: int, epochs: int, **options: Any) -> list[list[str]]:
    """A row for each drafter, way and epoch."""
    rows = [["drafts from", "samples", "epoch", "acceptance length", "steps", "nodes"]]
    ways = {
        "at once": [[prompt] * samples for prompt in prompts],
        "in turn": [[p] for p in prompts for _ in range(samples)],
    }
    for share in (False, True):
        for way, texts in ways.items():
            drafter = SuffixDrafter(shared=share, remembered=2**20)
            for epoch in range(epochs):
                found = [*steps(target, drafter, texts, 0, seed=epoch, **options)]
                rows.append(["shared" if share else "its own text", way, str(epoch + 1), *counts(found)])
                print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-task", type=int, default=4, help="prompts of each of four tasks")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.5])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    made = provenance("-m experiments.studies.shared_suffix", [], vars(asked), "cpu")
    pair = specdec.demo.load()
    prompts = [torch.tensor(pair.tokenizer(p.turns[0])["input_ids"]) for p in demo(TASKS, asked.per_task)]
    tables = []
    for temperature in asked.temperatures:
        options = {"max_new_tokens": asked.new_tokens, "sampling": Sampling(temperature)}
        found = table(pair.target, prompts, asked.samples, asked.epochs, **options)
        tables.append(f"## Temperature {temperature:g}\n\n{markdown(found)}")
    text = HEAD.format(
        prompts=len(prompts), samples=asked.samples, per_task=asked.per_task, new_tokens=asked.new_tokens,
        commit=made["commit"] + (" with uncommitted changes" if made["dirty"] else ""),
        versions=", ".join(f"{name} {version}" for name, version in made["versions"].items()),
        date=made["date"][:10], cpu=made["cpu"], tables="\n\n".join(tables),
    )  # fmt: skip
    (ROOT / "experiments" / "results" / "shared_suffix.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
