"""Whole steps on a GPU, as they stand, as graphs and compiled, beside transformers: speed, where time goes, and the floor.

    python kernels/bench/bench_engine.py --seconds 500

The targets are the demo target made as large as models of 8 and 1 billion parameters, computing what it does (see
`experiments/enlarge.py`; their vocabulary stays small: `bench_head.py` times a large one), so that acceptance is real and costs
are full. They are drafted for by the demo's draft, as it is and made as large as a model of 1 billion, by the target without
some of its layers, and by the demo's Medusa heads, made as wide as the target. Texts longer than the demo models were trained
on are read all the same. Needs torch, triton and transformers, but no hydra.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import specdec
from experiments import baseline
from experiments.enlarge import enlarge, widen
from specdec import Generation
from specdec.drafters import LayerSkipDrafter, MedusaDrafter, MedusaHeads, ModelDrafter
from specdec.trees import Chain, Widths

SIZES = {"8B": (32, 14336, 4096), "1B": (16, 8192, 2048), "tiny": (6, 640, 256)}  # layers, intermediate, hidden
SKIPPED = (1, 2, 3, 5)  # layers that the demo target drafts best without: experiments/search_skip.py
RUNS = 3  # timed, after one that is not
PROFILED = 4  # steps
SLOW = ["compile"]


class Case(NamedTuple):
    """One target, batch size and length of text."""

    size: str
    batch: int
    context: int


CASES = [
    Case("8B", 1, 1024), Case("8B", 1, 8192), Case("1B", 1, 1024), Case("8B", 8, 1024), Case("8B", 32, 1024),
    Case("1B", 8, 1024), Case("1B", 32, 1024), Case("8B", 8, 8192), Case("1B", 1, 8192),
]  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--seconds", type=float, default=500, help="begin no method after so long")
    options.add_argument("--device", default="cuda")
    options.add_argument("--cases", nargs="*", help="SIZE,BATCH,CONTEXT; by default all of the published table")
    options.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    options.add_argument("--new-tokens", type=int, default=96)
    options.add_argument("--results", type=Path, default=report.ROOT / "experiments/results")
    chosen = options.parse_args()
    cases = [Case(s, int(b), int(c)) for s, b, c in (case.split(",") for case in chosen.cases or ())] or CASES
    source, rows, left = report.provenance(), [], []
    rate, end = report.bandwidth(chosen.device), time.monotonic() + chosen.seconds
    for case, engines in parts(cases, chosen.engines):
        now = time.monotonic()
        until = now + (end - now) / 2 if engines == SLOW and case == cases[0] != cases[-1] else end
        for row in figures(case, chosen.device, engines, chosen.new_tokens, rate, until):
            if row is None:
                left.append("{}, batch {}, context {}: {}".format(*case, ", ".join(engines)))
            else:
                rows.append(row)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            notes = {
                **source,
                "copy bandwidth, bytes/s": rate,
                "new tokens": chosen.new_tokens,
                "runs": RUNS,
                "left out, in whole or in part": left,
            }
            report.write(rows, notes, chosen.results, "engine_{gpu}_{date}")  # now: time may run out
    print(f"left out, in whole or in part: {left}")


def parts(cases: list[Case], engines: list[str]) -> Iterator[tuple[Case, list[str]]]:
    """What compiles takes minutes: it comes second of the first case, for half of the time left, and last of the others."""
    fast, slow = ([engine for engine in engines if (engine in SLOW) == late] for late in (False, True))
    first, *others = cases
    order = [(first, fast), (first, slow), *((case, fast) for case in others), *((case, slow) for case in others)]
    yield from (part for part in order if part[1])


def figures(
    case: Case, device: str, engines: list[str], new_tokens: int, rate: float, end: float
) -> Iterator[dict[str, Any] | None]:
    """One row per method of a case, with a reason in place of figures if it fails; None if time ran out.

    Method after method, not in turns: the caches and graphs of all of them at once do not fit the largest cases.
    """
    if time.monotonic() > end:
        yield None
        return
    pair, dtype = specdec.demo.load(), torch.bfloat16 if device == "cuda" else torch.float32
    target, large = (grown(model, case, device, dtype) for model in (pair.target, pair.draft))
    small = grown(pair.draft, case._replace(size=""), device, dtype)
    heads, prompts = widen(pair.heads, target.config.hidden_size).to(target.dtype), texts(pair, case)
    weights = sum(p.numel() * p.element_size() for p in target.parameters())
    base: dict[str, float] = {}  # of autoregressive decoding, by engine
    for name, make in methods(case, engines, target, large, small, heads).items():
        if time.monotonic() > end:
            yield None
            return
        engine, found = name.split(", ")[-1], {**case._asdict(), "method": name}
        try:
            run = make()
            run(target, prompts, max_new_tokens=new_tokens)  # captures and compiles
            outs = [run(target, prompts, max_new_tokens=new_tokens) for _ in range(RUNS)]
            if name.startswith("autoregressive"):
                base[engine] = speed(outs)
            found |= row(outs, base.get(engine), weights / rate)
            if engine in ENGINES and device == "cuda":
                found |= profiled(run, target, prompts)
        except Exception as error:
            found["reason"] = report.reason(error)
        yield found
        run = outs = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


ENGINES: dict[str, Callable[[], Any]] = {
    "eager": lambda: "eager",
    "graph": specdec.Graphs,
    "compile": partial(specdec.Graphs, compile=True),
}


def methods(
    case: Case,
    engines: list[str],
    target: PreTrainedModel,
    large: PreTrainedModel,
    small: PreTrainedModel,
    heads: MedusaHeads,
) -> dict[str, Callable]:
    """What is compared: makers of calls, each with an engine of its own."""
    skipped = (*SKIPPED, *range(6, target.config.num_hidden_layers))
    drafters = {
        "autoregressive": lambda: None,
        "small draft, chain of 4": lambda: ModelDrafter(small, Chain(4)),
        "small draft, tree of 4-2-2-1": lambda: ModelDrafter(small, Widths((4, 2, 2, 1))),
        "1B draft, chain of 4": lambda: ModelDrafter(large, Chain(4)),
        "layers left out, chain of 4": lambda: LayerSkipDrafter(skipped, tree=Chain(4)),
        "Medusa heads, chain of 4": lambda: MedusaDrafter(heads, Chain(4)),
    }
    ours = {
        f"{name}, {engine}": partial(_ours, drafter, ENGINES[engine])
        for engine in engines
        for name, drafter in drafters.items()
    }
    if engines == SLOW:  # the rest of a case that was timed before
        return ours
    theirs: dict[str, Callable] = {"transformers": lambda: baseline.generate}
    if case.batch == 1:
        theirs["transformers, assisted by the small draft"] = lambda: partial(baseline.generate, assistant=small)
    return {**ours, **theirs}


def _ours(drafter: Callable[[], Any], engine: Callable[[], Any]) -> Callable[..., Generation]:
    return partial(specdec.generate, drafter=drafter(), engine=engine(), stop_tokens=())


def grown(model: Any, case: Case, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the demo pair on the device, and of the case's size if it has one; drafts are at most of 1B."""
    model = model.to(device=device, dtype=dtype)
    if case.size:
        size = "1B" if case.size == "8B" and model.config.num_hidden_layers == 1 else case.size
        layers, intermediate, hidden = SIZES[size]
        model = enlarge(model, layers, intermediate, hidden_size=hidden)
    model.config.max_position_embeddings = 2 * case.context + 1024  # rotary positions know no limit of their own
    model.generation_config.eos_token_id = None
    return model


def texts(pair: Any, case: Case) -> list[Tensor]:
    """Prompts of `context` tokens and the root: the demo's, one after the other. So no block of text begins and is captured
    and compiled for at the first new token.
    """
    ids = [pair.tokenizer(prompt.text)["input_ids"] for prompt in pair.prompts]
    rows = []
    for b in range(case.batch):
        row = [token for text in ids[b % len(ids) :] + ids[: b % len(ids)] for token in text]
        row = row * (case.context // len(row) + 1)  # more tokens than `context`
        rows.append(torch.tensor(row[-case.context - 1 :]))
    return rows


def speed(found: list[Generation]) -> float:
    """Tokens per second: the median run."""
    return statistics.median(out.summary()["tokens_per_second"] for out in found)


def row(found: list[Generation], base: float | None, floor: float) -> dict[str, Any]:
    """The figures of one method; times in milliseconds per step, the median run.

    Args:
        base: tokens per second of autoregressive decoding by the same engine.
        floor: seconds that reading the target's weights takes.
    """
    summaries = [out.summary() for out in found]
    steps = summaries[0]["target_forwards"]
    draft, verify, other = (
        1e3 * statistics.median(s[f"{part}_seconds"] for s in summaries) / steps
        for part in ("draft", "verify", "other")
    )
    return {
        "tokens/s": speed(found),
        "spread": max(s["tokens_per_second"] for s in summaries) / min(s["tokens_per_second"] for s in summaries),
        "speed-up": speed(found) / base if base else None,
        "acceptance length": summaries[0]["acceptance_length"],
        "draft ms": draft,
        "verify ms": verify,
        "other ms": other,
        "verify / weight floor": verify / (1e3 * floor),
        "other share": other / (draft + verify + other),
    }


def profiled(run: Callable[..., Generation], target: PreTrainedModel, prompts: list[Tensor]) -> dict[str, Any]:
    """Kernels per step, and the share of the time in which the device is at work, over a few steps."""
    arguments = getattr(run, "keywords", {})
    steps = specdec.stream(target, prompts, max_new_tokens=96, **arguments)
    for _ in range(PROFILED):  # shapes that are new are captured
        next(steps)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        for _ in range(PROFILED):
            next(steps)
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    kernels = [event for event in seen.events() or () if str(event.device_type).endswith("CUDA")]
    busy = sum(event.device_time for event in kernels) / 1e6
    return {"kernels per step": len(kernels) / PROFILED, "device busy": busy / wall}


if __name__ == "__main__":
    main()
