"""Drafters, paused and not: on a virtual clock, and on this machine's.

    python experiments/studies/pausing.py virtual --per-task=4
    python experiments/studies/pausing.py real --target=enlarged --new-tokens=48

On the virtual clock a step without a draft takes 1, and each pass of the draft model and each further node of the tree what the
setting says; what is accepted is what the demo pair really accepts. Prints the tables of `experiments/results/pausing_cpu.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import specdec
from experiments.bench.models import untrained
from experiments.bench.prompts import demo
from experiments.bench.report import markdown
from experiments.bench.results import provenance
from experiments.demo_pair import enlarge
from specdec import Sampling
from specdec.drafters import Drafter, ModelDrafter, Paused, SuffixDrafter
from specdec.drafters.model import ModelDraftRun
from specdec.models.target import ModelTargetRun
from specdec.trees import Chain

SAMPLINGS = {"greedy": Sampling(), "temperature 1": Sampling(1.0)}
# seconds of a pass of the draft model, and of each further node
COSTS = {"pays": (0.08, 0.02), "hardly pays": (0.25, 0.05), "does not pay": (0.6, 0.1)}


def drafters(models: Any) -> dict[str, Drafter | None]:
    """What is compared; the first is the baseline."""
    fixed = {
        "chain 2": ModelDrafter(models.draft, Chain(2)),
        "chain 4": ModelDrafter(models.draft, Chain(4)),
        "suffix": SuffixDrafter(),
        "untrained, chain 2": ModelDrafter(untrained(models.draft), Chain(2)),
    }
    paused = {f"{name}, paused": Paused(drafter, patience=3.0, share=0.02) for name, drafter in fixed.items()}
    return {"no draft": None, **dict(sorted({**fixed, **paused}.items())), "no draft again": None}


@contextmanager
def virtual_clock(draft: float, node: float) -> Iterator[None]:
    """Time passes in the models' passes alone, and `time.perf_counter` tells it."""
    now = 0.0

    def taking(kind: type, seconds: Callable[[int], float]) -> Any:
        score = kind.score

        def timed(run: Any, part: Any) -> Any:
            nonlocal now
            now += seconds(part.tokens.shape[1])
            return score(run, part)

        return mock.patch.object(kind, "score", timed)

    target = taking(ModelTargetRun, lambda nodes: 1 + node * (nodes - 1))
    with mock.patch("time.perf_counter", lambda: now), target, taking(ModelDraftRun, lambda _: draft):
        yield


def speeds(target: Any, drafter: Drafter | None, prompts: list[Tensor], **options: Any) -> tuple[float, float]:
    """Tokens per second of decoding, and per second that the processor has worked for the whole run."""
    began = time.process_time()
    out = specdec.generate(target, prompts, drafter, stop_tokens=(), **options)
    tokens = sum(map(len, out.tokens))
    seconds = sum(step.seconds for step in out.trace.steps)
    return tokens / seconds, tokens / (time.process_time() - began)


def compared(target: Any, methods: dict, batches: list[list[Tensor]], **options: Any) -> dict[str, np.ndarray]:
    """[2, batch] of each: speeds over the baseline's, interleaved; by decoding time and by processor time."""
    found = [
        [speeds(target, drafter, batch, seed=seed, **options) for drafter in methods.values()]
        for seed, batch in enumerate(batches)
    ]
    table = np.array(found)  # [batch, method, 2]
    return dict(zip(methods, (table / table[:, :1]).transpose(1, 2, 0), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clock", choices=["virtual", "real"])
    parser.add_argument("--target", choices=["demo", "enlarged"], default="demo")
    parser.add_argument("--per-task", type=int, default=2, help="prompts of each of four tasks")
    parser.add_argument("--new-tokens", type=int, default=64)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    models = specdec.demo.load() if asked.target == "demo" else enlarge.load(24, 2560)
    prompts = demo(["functions", "docstrings", "tests", "prose"], asked.per_task)
    ids = [torch.tensor(models.tokenizer(prompt.turns[0])["input_ids"]) for prompt in prompts]
    batches = {1: [[each] for each in ids[::2]], 8: [ids[:: len(ids) // 8], ids[len(ids) // 8 - 1 :: len(ids) // 8]]}
    virtual, methods, columns = asked.clock == "virtual", drafters(models), {}
    for size, law in ((size, law) for size in batches for law in SAMPLINGS):
        options = {"max_new_tokens": asked.new_tokens, "sampling": SAMPLINGS[law]}
        compared(models.target, methods, batches[size][:1], **{**options, "max_new_tokens": 8})  # warmed up
        for setting in COSTS if virtual else [""]:
            with virtual_clock(*COSTS[setting]) if virtual else nullcontext():
                columns[f"batch {size}, {law} {setting}".rstrip()] = compared(
                    models.target, methods, batches[size], **options
                )
    rows = [["over no draft", *(name + clock for name in columns for clock in ("", ", processor")[: 2 - virtual])]]
    for name in methods:
        ratios = [clock for found in columns.values() for clock in found[name][: 2 - virtual]]
        rows.append([name, *(f"{each.mean():.2f} ({each.min():.2f}-{each.max():.2f})" for each in ratios)])
    print(markdown(rows), provenance("experiments/studies/pausing.py", [], vars(asked), "cpu"), sep="\n\n")


if __name__ == "__main__":
    main()
