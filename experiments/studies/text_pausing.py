"""Text drafters, paused and not, on the recorded texts of a real model and a virtual clock.

    python experiments/studies/text_pausing.py record texts.json --folder=FOLDER
    python experiments/studies/text_pausing.py replay texts.json

What a text drafter drafts, and what of it is accepted, follows from the text alone. So texts are decoded once, without a draft
(`record`: SmolLM2 in bfloat16, prompts of `task=real`), and then replayed by a target that gives all weight to the recorded
tokens, through `specdec.generate` as it is, while `time.perf_counter` tells the seconds that such steps took when they were
measured (`MEASURED`). Prints the table of `experiments/results/pausing_cpu.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import specdec
from experiments.bench.inputs import ids_of
from experiments.bench.models import smollm2
from experiments.bench.real_prompts import real
from experiments.bench.report import markdown
from specdec import Sampling
from specdec.batch import Batch
from specdec.clock import told_by
from specdec.drafters import Drafter, NgramDrafter, Paused, SuffixDrafter
from specdec.models.target import Scores, TargetRun
from specdec.prediction.replay import Recorded, RecordedRun
from specdec.theory import CostCurve
from specdec.tree import DraftTree

TASKS = ["mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag", "humaneval", "gsm8k"]
LAWS = {"greedy": Sampling(), "T = 0.7": Sampling(0.7)}
# milliseconds of a step with so many nodes, by batch: SmolLM2, float32, one thread of an EPYC, contexts of 100 tokens
NODES = (1, 2, 3, 5, 9, 17)
MEASURED = {
    1: CostCurve(NODES, (64, 95, 114, 98, 109, 138)),
    8: CostCurve(NODES, (107, 136, 165, 217, 314, 524)),
    32: CostCurve(NODES, (189, 297, 398, 581, 960, 1778)),
}
METHODS: dict[str, Drafter] = {
    "n-gram": NgramDrafter(),
    "n-gram, paused": Paused(NgramDrafter()),
    "suffix": SuffixDrafter(),
    "suffix, paused": Paused(SuffixDrafter()),
}


class Timed(Recorded):
    """Recorded texts on a clock that the steps move on."""

    now = 0.0

    def start(self, batch: Batch, states: Sequence[int] = (), last: TargetRun | None = None) -> TargetRun:
        return TimedRun(self, batch)


class TimedRun(RecordedRun):
    target: Timed

    def score(self, tree: DraftTree) -> Scores:
        rows, nodes = tree.tokens.shape
        self.target.now += MEASURED[rows](nodes)
        return super().score(tree)


def replay(texts: list[tuple[Tensor, Tensor]], drafter: Drafter | None) -> float:
    """Milliseconds of decoding these texts together."""
    known = torch.unique(torch.cat([part for text in texts for part in text]))  # a small vocabulary takes less time
    small = [(torch.searchsorted(known, prompt), torch.searchsorted(known, new)) for prompt, new in texts]
    prompts, news = ([text[i] for text in small] for i in (0, 1))
    target = Timed([torch.cat(text) for text in small], len(known))
    with told_by(lambda: target.now):
        budgets = [len(new) for new in news]
        out = specdec.generate(target, prompts, drafter, max_new_tokens=budgets, stop_tokens=())
    assert all(map(torch.equal, out.tokens, news))
    return target.now


def record(folder: str, per_task: int) -> dict[str, Any]:
    """For each task and law the [prompt, new tokens] of each text."""
    models, found = smollm2(dtype=torch.bfloat16), {}
    for task in TASKS:
        ids = [ids_of(models.tokenizer, prompt.turns[:1], True) for prompt in real(folder, [task], per_task)]
        for law, sampling in LAWS.items():
            out = specdec.generate(models.target, ids, sampling=sampling, max_new_tokens=64)
            found[f"{task}, {law}"] = [[p.tolist(), new.tolist()] for p, new in zip(ids, out.tokens, strict=True)]
    return found


def table(texts: dict[str, list[tuple[Tensor, Tensor]]]) -> list[list[str]]:
    """Speed over no draft: means over the prompts of a task, alone or 8 together, and of 32 of all tasks."""
    rows = [["over no draft", *METHODS, *(f"{name}, batch 8" for name in METHODS)]]
    for name, each in texts.items():
        batches = {1: [[text] for text in each], 8: [each]}
        means = [_speed(batches[size], drafter) for size in batches for drafter in METHODS.values()]
        rows.append([name, *(f"{mean:.2f}" for mean in means)])
    for law in LAWS:
        mixed = [text for name, each in texts.items() if name.endswith(law) for text in each[:4]]
        means = [f"{_speed([mixed], drafter):.2f}" for drafter in METHODS.values()]
        rows.append([f"32 of all tasks, {law}", *means, *["-"] * len(means)])
    return rows


def _speed(batches: list[list[tuple[Tensor, Tensor]]], drafter: Drafter) -> float:
    return float(np.mean([replay(batch, None) / replay(batch, drafter) for batch in batches]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("does", choices=["record", "replay"])
    parser.add_argument("texts", type=Path)
    parser.add_argument("--folder", help="with the prompts: see experiments/bench/real_prompts.py")
    parser.add_argument("--per-task", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.does == "record":
        asked.texts.write_text(json.dumps(record(asked.folder, asked.per_task)))
        return
    read = json.loads(asked.texts.read_text())
    texts = {name: [(torch.tensor(p), torch.tensor(new)) for p, new in each] for name, each in read.items()}
    print(markdown(table(texts)))


if __name__ == "__main__":
    main()
