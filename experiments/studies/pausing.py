"""Drafters, paused and not: on a virtual clock, and on this machine's.

    python experiments/studies/pausing.py virtual
    python experiments/studies/pausing.py real --target=enlarged

On the virtual clock a step without a draft takes 1, and each pass of the draft model and each further node of the tree what the
setting says; what is accepted is what the demo pair really accepts. Prints a table: `experiments/results/pausing_cpu.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from specdec.drafters import Drafter, ModelDrafter, NgramDrafter, Paused, SuffixDrafter
from specdec.drafters.model import ModelDraftRun
from specdec.models.target import ModelTargetRun
from specdec.trees import Adaptive, Chain

SAMPLINGS = {"greedy": Sampling(), "temperature 1": Sampling(1.0)}
# seconds of a pass of the draft model, and of each further node
SETTINGS = {"pays": (0.08, 0.02), "hardly pays": (0.25, 0.05), "does not pay": (0.6, 0.1)}


def drafters(models: Any) -> dict[str, Drafter | None]:
    """What is compared; the first is the baseline."""
    bad = untrained(models.draft)
    fixed = {
        "chain 2": ModelDrafter(models.draft, Chain(2)),
        "chain 4": ModelDrafter(models.draft, Chain(4)),
        "untrained, chain 2": ModelDrafter(bad, Chain(2)),
        "n-gram": NgramDrafter(),
        "suffix": SuffixDrafter(),
    }
    paused = {f"{name}, paused": Paused(drafter) for name, drafter in fixed.items()}
    adaptive = {
        "adaptive": ModelDrafter(models.draft, Adaptive()),
        "untrained, adaptive": ModelDrafter(bad, Adaptive()),
    }
    return {"no draft": None, **dict(sorted({**fixed, **paused, **adaptive}.items())), "no draft again": None}


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

    with (
        mock.patch("time.perf_counter", lambda: now),
        taking(ModelTargetRun, lambda nodes: 1 + node * (nodes - 1)),
        taking(ModelDraftRun, lambda nodes: draft),
    ):
        yield


def speeds(target: Any, drafter: Drafter | None, prompts: list[Tensor], **options: Any) -> tuple[float, float]:
    """Tokens per second of decoding, and per second that the processor has worked for the whole run."""
    began = time.process_time()
    out = specdec.generate(target, prompts, drafter, stop_tokens=(), **options)
    tokens, seconds = sum(map(len, out.tokens)), sum(sum(_parts(step)) for step in out.trace.steps)
    return tokens / seconds, tokens / (time.process_time() - began)


def _parts(step: Any) -> tuple[float, float, float]:
    return step.draft_seconds, step.verify_seconds, step.other_seconds


def compared(
    target: Any, methods: dict, batches: list[list[Tensor]], rounds: int, **options: Any
) -> dict[str, np.ndarray]:
    """[2, run] of each: speeds over the baseline's, interleaved; by decoding time and by processor time."""
    found = [
        [speeds(target, drafter, batch, seed=seed, **options) for drafter in methods.values()]
        for seed in range(rounds)
        for batch in batches
    ]
    table = np.array(found)  # [run, method, 2]
    return dict(zip(methods, (table / table[:, :1]).transpose(1, 2, 0), strict=True))


def shown(ratios: np.ndarray) -> str:
    """The median, and the middle half."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clock", choices=["virtual", "real"])
    parser.add_argument("--target", choices=["demo", "enlarged"], default="demo")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    models = specdec.demo.load() if asked.target == "demo" else enlarge.load(24, 2560)
    tasks = ["functions", "docstrings", "tests", "prose"]
    ids = [torch.tensor(models.tokenizer(p.turns[0])["input_ids"]) for p in demo(tasks, 2)]
    columns: dict[str, dict[str, np.ndarray]] = {}
    for size, batches in ((1, [[prompt] for prompt in ids[::2]]), (8, [ids])):
        for law, sampling in SAMPLINGS.items():
            options = {"max_new_tokens": asked.new_tokens, "sampling": sampling}
            for setting, costs in SETTINGS.items() if asked.clock == "virtual" else [("", None)]:
                methods = drafters(models)
                name = f"batch {size}, {law}" + f", {setting}" * bool(setting)
                compared(models.target, methods, batches[:1], 1, **{**options, "max_new_tokens": 8})  # warmed up
                if costs:
                    with virtual_clock(*costs):
                        columns[name] = compared(models.target, methods, batches, asked.rounds, **options)
                else:
                    columns[name] = compared(models.target, methods, batches, asked.rounds, **options)
    clocks = [0] if asked.clock == "virtual" else [0, 1]
    header = [f"{name}{', processor time' * clock}" for name in columns for clock in clocks]
    rows = [[name, *(shown(found[name][clock]) for found in columns.values() for clock in clocks)] for name in methods]
    print(markdown([["over no draft", *header], *rows]))
    print({key: value for key, value in provenance(__file__, [], vars(asked), "cpu").items() if key != "options"})


if __name__ == "__main__":
    main()
