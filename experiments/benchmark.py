"""Speculative decoding on the bundled demo pair: every drafter against the same loop without one, in one table.

    python experiments/benchmark.py [--temperature 0.8] [--batch 8] [--repeats 5]

Runs are interleaved (every round runs every method on every prompt) and ratios are paired by round and prompt; the
interval is a bootstrap of the median.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

import specdec
from specdec.drafters import Drafter, ModelDrafter, NgramDrafter
from specdec.trees import Chain, Widths


def methods(pair: specdec.demo.Demo) -> dict[str, Drafter | None]:
    """Name and drafter of every method; the first is the baseline."""
    return {
        "autoregressive": None,
        "n-gram": NgramDrafter(8),
        "model, chain of 4": ModelDrafter(pair.draft, Chain(4)),
        "model, tree 4-2-1": ModelDrafter(pair.draft, Widths([4, 2, 1])),
    }


def measure(pair: specdec.demo.Demo, options: argparse.Namespace) -> dict[str, dict[str, list[Any]]]:
    """Per method: tokens/s, acceptance length and rates, and equality with transformers, one entry per run."""
    per_task = options.prompts
    tasks = sorted({p.task for p in pair.prompts})
    prompts = [p for task in tasks for p in [p for p in pair.prompts if p.task == task][:per_task]]
    texts = [torch.tensor(pair.tokenizer(p.text)["input_ids"]) for p in prompts]
    groups = [texts[i : i + options.batch] for i in range(0, len(texts), options.batch)]
    sampling, drafters = specdec.Sampling(options.temperature), methods(pair)
    runs: dict[str, dict[str, list[Any]]] = {name: defaultdict(list) for name in drafters}
    with tqdm(total=options.repeats * len(groups) * len(drafters), desc="decoding", leave=False) as bar:
        for seed in range(options.repeats):
            for group in groups:
                expected = [_reference(pair, ids, options) for ids in group] if seed == 0 else None
                for name, drafter in drafters.items():
                    out = specdec.generate(
                        pair.target, group, drafter, sampling=sampling, max_new_tokens=options.tokens, seed=seed
                    )
                    summary = out.summary()
                    for key in ("tokens_per_second", "acceptance_length", "acceptance_rate"):
                        runs[name][key].append(summary[key])
                    runs[name]["other_share"].append(summary["other_seconds"] / summary["decode_seconds"])
                    if expected and options.temperature == 0:
                        runs[name]["identical"] += map(torch.equal, out.tokens, expected)
                    bar.update()
    return runs


def _reference(pair: specdec.demo.Demo, ids: torch.Tensor, options: argparse.Namespace) -> torch.Tensor:
    model: Any = pair.target
    return model.generate(ids[None], do_sample=False, max_new_tokens=options.tokens)[0, len(ids) :]


def median(values: list[float]) -> tuple[float, float, float]:
    """Median with its bootstrap 95 % interval."""
    sample = np.asarray(values)
    draws = np.median(np.random.default_rng(0).choice(sample, (1000, len(sample))), axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.median(sample)), float(low), float(high)


def table(runs: dict[str, dict[str, list[Any]]]) -> str:
    """The results as a markdown table."""
    base = np.asarray(next(iter(runs.values()))["tokens_per_second"])
    lines = [
        "| method | tokens/s (95 % CI) | speed-up (95 % CI) | acceptance length | rate by depth | = transformers |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, run in runs.items():
        speed = "{:.0f} ({:.0f}-{:.0f})".format(*median(run["tokens_per_second"]))
        ratio = "{:.2f} ({:.2f}-{:.2f})".format(*median(list(np.asarray(run["tokens_per_second"]) / base)))
        depth = max(map(len, run["acceptance_rate"]))
        rates = [np.mean([r[d] for r in run["acceptance_rate"] if len(r) > d]) for d in range(depth)]
        same = f"{sum(run['identical'])}/{len(run['identical'])}" if run["identical"] else "sampled"
        shown = " ".join(f"{r:.2f}" for r in rates) or "-"
        lines.append(f"| {name} | {speed} | {ratio} | {np.mean(run['acceptance_length']):.2f} | {shown} | {same} |")
    return "\n".join(lines)


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """What produced the figures."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "specdec": specdec.__version__}
    return {"options": vars(options), "commit": git.stdout.strip(), "versions": versions, "machine": platform.processor() or platform.machine(), "dtype": "float32", "threads": 1}  # fmt: skip  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=3, help="prompts per task")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    runs = measure(specdec.demo.load(), options)
    print(f"demo pair, float32, one CPU thread, batch {options.batch}, temperature {options.temperature:g}\n")
    print(table(runs))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"runs": runs, **provenance(options)}, indent=1, default=str))


if __name__ == "__main__":
    main()
