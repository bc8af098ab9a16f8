"""Rows that are refilled beside batches one after another, and beside transformers' continuous batching.

    OMP_NUM_THREADS=1 python -m experiments.studies.batching --output experiments/results/batching_cpu.json

The demo pair, sampled, with stop tokens at the ends of paragraphs. Each round measures every case in all ways, one after the
other, with a seed of its own; the order of the ways turns from round to round. What is complete is kept in the output, and the
same command goes on from there. At the end a table is written beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import specdec
from experiments.bench.results import Json, provenance, whole
from experiments.studies import batching_page, batching_prompts
from experiments.studies.batching_page import SLOTS, TODAY
from experiments.studies.batching_ways import Case, Job, drafters, one_after_another, slots, ways


def measured(job: Job) -> dict[str, Any]:
    """Figures of all ways, and where texts part between the first two."""
    found, texts = {}, {}
    order = list(ways(job.case).items())
    turn = job.seed % len(order)
    for name, way in order[turn:] + order[:turn]:
        wall, process = time.perf_counter(), time.process_time()
        texts[name], counts = way(job)
        seconds = {"process": time.process_time() - process, "wall": time.perf_counter() - wall}
        found[name] = {"tokens": sum(map(len, texts[name])), "seconds": seconds, **counts}
    parted = partings(texts[TODAY], texts[SLOTS])
    exact = partings(*exactly(job)) if parted else None
    return {"case": job.case.name, "seed": job.seed, "ways": found, "partings": parted, "partings_float64": exact}


def partings(some: list[list[int]], others: list[list[int]]) -> dict[str, int]:
    """By text, as JSON has it: after how many tokens two ways part."""
    found = {}
    for i, (a, b) in enumerate(zip(some, others, strict=True)):
        if a != b:
            shared = (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            found[str(i)] = next(shared, min(len(a), len(b)))
    return found


def exactly(job: Job) -> tuple[list[list[int]], list[list[int]]]:
    """The texts of the first two ways in float64: what parts only in float32 parts by rounding."""
    pair = specdec.demo.load(torch.float64)
    wide = job._replace(pair=pair, drafter=drafters(pair)[job.case.drafter])
    return one_after_another(wide)[0], slots(wide)[0]


def cases(asked: argparse.Namespace) -> list[Case]:
    sizes = [(8, asked.prompts), (32, asked.prompts), (32, 4 * asked.prompts)]
    return [Case(*size, drafter) for size in sizes for drafter in ("none", "chain of 2", "n-gram")]


def rounds(asked: argparse.Namespace, done: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Everything that is not done yet, case by case."""
    pair = specdec.demo.load()
    ids = [torch.tensor(pair.tokenizer(prompt.text)["input_ids"]) for prompt in pair.prompts[: asked.prompts]]
    methods = drafters(pair)
    jobs = [
        Job(pair, ids * (case.prompts // len(ids)), methods[case.drafter], case, asked.tokens, seed)
        for seed in range(asked.rounds)
        for case in cases(asked)
        if (case.name, seed) not in done
    ]
    for job in {job.case.drafter: job for job in jobs}.values():  # warmed up
        for way in ways(job.case).values():
            way(job._replace(prompts=ids[:2], tokens=4))
    yield from map(measured, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64, help="of the demo pair; the last cases have each four times")
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens of a text")
    parser.add_argument("--newcomer", type=int, default=4000, help="tokens of the one long prompt")
    parser.add_argument("--output", default="outputs/batching.json")
    asked = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit(
            "Set OMP_NUM_THREADS=1: generate_batch decodes in a thread of its own, which takes all cores else."
        )
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    result = taken_up(asked)
    log = Json(asked.output)
    for row in rounds(asked, {(row["case"], row["seed"]) for row in result["rows"]}):
        result["rows"].append(row)
        log.write(result)
        print(batching_page.line(row), flush=True)
    for name, study in batching_prompts.STUDIES.items():
        if name not in result:
            result[name] = study(asked)
            log.write(result)
    page = batching_page.page(result)
    with whole(Path(asked.output).with_suffix(".md")) as file:
        file.write_text(page, "utf-8")
    print(page)


def taken_up(asked: argparse.Namespace) -> dict[str, Any]:
    """What the output holds already; exits if it was measured with other options or on other code."""
    options = {key: value for key, value in vars(asked).items() if key not in ("output", "rounds")}
    source = provenance("-m", ["experiments.studies.batching"], options, "cpu")
    if not Path(asked.output).exists():
        return {**source, "rows": []}
    found = json.loads(Path(asked.output).read_text("utf-8"))
    if differing := [key for key in ("options", "commit", "versions") if found[key] != source[key]]:
        raise SystemExit(f"{asked.output} was measured with other {' and '.join(differing)}: choose another output.")
    return found


if __name__ == "__main__":
    main()
