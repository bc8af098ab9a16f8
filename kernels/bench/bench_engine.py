"""Whole steps on a GPU, as they stand, as graphs and compiled, beside transformers: speed, where time goes, and the floor.

    python kernels/bench/bench_engine.py --seconds 500

Two kinds of target. "8B" and "1B" are the demo target made as large as such models, computing what it does (see
`experiments/demo_pair/enlarge.py`), so that acceptance is real; their heads and vocabulary are not those of a published
model. They are drafted for by the demo's draft, as it is and made as large as a model of 1 billion, by the target without
some of its layers, and by the demo's Medusa heads, made as wide as the target. "Llama-3-8B" has the exact shape of that
model and random weights: there the verification of trees of some sizes, of which nothing is accepted, is compared with its
floor, the reading of the weights.
Texts longer than the demo models were trained on are read all the same. Every method has a process of its own.
Needs torch, triton and transformers, but no hydra.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import processes
import report
import torch
from llama import FixedTree, llama3
from meter import LoadMeter
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import specdec
from experiments.demo_pair.enlarge import enlarge, widen
from experiments.peer_methods import baseline
from specdec import Generation
from specdec.clock import finish
from specdec.drafters import LayerSkipDrafter, MedusaDrafter, ModelDrafter
from specdec.trees import Chain, Widths

SIZES = {"8B": (32, 14336, 4096), "1B": (16, 8192, 2048), "tiny": (6, 640, 256)}  # layers, intermediate, hidden
SKIPPED = (1, 2, 3, 5)  # layers that the demo target drafts best without, as specdec.tune finds them
RUNS = 3  # timed, after one that is not
PROFILED = 4  # steps
LISTED = 15  # kernels of a profile
SLOW = ["compile"]
RANDOM, TINY_RANDOM = "Llama-3-8B", "tiny random"


class Case(NamedTuple):
    """One target, batch size and length of text."""

    size: str
    batch: int
    context: int

    @property
    def random(self) -> bool:
        """Whether the target has random weights, so that nothing that is drafted for it is accepted."""
        return self.size in (RANDOM, TINY_RANDOM)


CASES = [
    Case("8B", 1, 1024), Case(RANDOM, 1, 1024), Case(RANDOM, 1, 8192), Case("8B", 1, 8192), Case("1B", 1, 1024),
    Case("8B", 8, 1024), Case(RANDOM, 8, 1024), Case("8B", 32, 1024), Case("1B", 8, 1024), Case("1B", 32, 1024),
    Case("8B", 8, 8192), Case("1B", 1, 8192),
]  # fmt: skip
DRY = [Case("tiny", 1, 40), Case(TINY_RANDOM, 1, 40)]


def main() -> None:
    options = processes.arguments(500)
    options.add_argument("--cases", nargs="*", help="SIZE,BATCH,CONTEXT; by default all of the published table")
    options.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    options.add_argument("--few", action="store_true", help="the most telling methods alone")
    options.add_argument("--new-tokens", type=int, default=96)
    chosen = options.parse_args()
    cases = [Case(s, int(b), int(c)) for s, b, c in (case.split(",") for case in chosen.cases or ())] or CASES
    if chosen.method is not None:
        processes.write_rows(
            chosen, cases, lambda case, device: figures(case, chosen.method, device, chosen.new_tokens)
        )
        return
    run_all(DRY if chosen.dry_run else cases, chosen)


def run_all(cases: list[Case], chosen: argparse.Namespace) -> None:
    """Every method in a process of its own; what compiles takes minutes, and has half of the time that is left."""
    notes, rows, profiles, left = {**report.provenance(), "runs": RUNS, "new tokens": chosen.new_tokens}, [], [], []
    end, base = time.monotonic() + chosen.seconds, {}  # tokens/s of autoregressive decoding, by case and engine
    shared = ["--new-tokens", str(chosen.new_tokens), *(["--dry-run"] if chosen.dry_run else [])]
    for case, engines in parts(cases, chosen.engines):
        now = time.monotonic()
        until = now + (end - now) / 2 if engines == SLOW and case == cases[0] != cases[-1] else end
        for method in methods(case, engines, chosen.few):
            text = ",".join(map(str, case))
            command = [__file__, "--method", method, "--cases", text, *shared]
            found = processes.rows_of(command, 1, until - time.monotonic()) or [{"reason": "left out for want of time"}]
            made: dict[str, Any] = {**case._asdict(), "method": method, **found[0]}
            profiles += [{**case._asdict(), "method": method, **kernel} for kernel in made.pop("kernels", ())]
            if "tokens/s" in made:
                place = case, method.split(", ")[-1]
                base.setdefault(place, made["tokens/s"] if method.startswith("autoregressive") else None)
                made["speed-up"] = made["tokens/s"] / base[place] if base[place] else None
            else:
                left.append(f"{text}: {method}: {made['reason']}")
            rows.append(made)
            report.write(rows, {**notes, "without figures": left}, chosen.results, "engine_{gpu}_{date}")
        report.write(profiles, notes, chosen.results, "engine_{gpu}_{date}_profile")  # now: time may run out
    print(f"without figures: {left}")


def parts(cases: list[Case], engines: list[str]) -> Iterator[tuple[Case, list[str]]]:
    """What compiles comes second of the first case, and last of the others."""
    fast, slow = ([engine for engine in engines if (engine in SLOW) == late] for late in (False, True))
    first, *others = cases
    order = [(first, fast), (first, slow), *((case, fast) for case in others), *((case, slow) for case in others)]
    yield from (part for part in order if part[1])


def figures(case: Case, method: str, device: str, new_tokens: int) -> dict[str, Any]:
    """The row of one method of a case."""
    torch.manual_seed(0)
    rate, dtype = report.bandwidth(device), torch.bfloat16 if device == "cuda" else torch.float32
    if case.random:
        target = specdec.join_weights(llama3(device, dtype, tiny=case.size != RANDOM))
        prompts = [torch.randint(target.config.vocab_size, (case.context + 1,)) for _ in range(case.batch)]
        run = random_method(method)
    else:
        pair = specdec.demo.load()
        target, prompts = grown(pair.target, case, device, dtype), texts(pair, case)
        run = demo_method(method, pair, target, case, device, dtype)
    weights = sum(p.numel() * p.element_size() for p in target.parameters())
    first = timed(run, target, prompts, new_tokens)  # captures and compiles
    with LoadMeter(device) as meter:
        runs = [timed(run, target, prompts, new_tokens) for _ in range(RUNS)]
    found = {**row(first, runs, weights / rate), **meter.columns()}
    engine = getattr(run, "keywords", {}).get("engine")
    found["graphs"] = getattr(engine, "captured", None)
    return found | (profiled(run, target, prompts) if engine is not None else {})


ENGINES: dict[str, Callable[[], Any]] = {
    "eager": lambda: "eager",
    "graph": specdec.Graphs,
    "compile": partial(specdec.Graphs, compile=True),
}


DRAFTERS = {
    "autoregressive": "none",
    "small draft, chain of 4": "small",
    "small draft, tree of 4-2-2-1": "small",
    "1B draft, chain of 4": "large",
    "layers left out, chain of 4": "layers",
    "Medusa heads, chain of 4": "heads",
}
FEW = ("autoregressive", "small draft, chain of 4")
NODES = (64, 16, 5)  # of trees that random weights verify


def methods(case: Case, engines: list[str], few: bool) -> list[str]:
    """What is compared, each method with an engine of its own."""
    if case.random:
        names = ["autoregressive", *(f"tree of {nodes} nodes" for nodes in (NODES[:1] if few else NODES))]
        return [f"{name}, {engine}" for engine in engines for name in names]
    ours = [f"{name}, {engine}" for engine in engines for name in (FEW if few else DRAFTERS)]
    if engines == SLOW or few:  # the rest of a case that was timed before
        return ours
    theirs = ["transformers", *(["transformers, assisted by the small draft"] if case.batch == 1 else [])]
    return [*ours, *theirs]


def random_method(method: str) -> Callable[..., Generation]:
    """Of a target of random weights: nothing, or a tree of so many nodes, is drafted."""
    name, engine = method.rsplit(", ", 1)
    drafter = None if name == "autoregressive" else FixedTree(int(name.split()[2]))
    return partial(specdec.generate, drafter=drafter, engine=ENGINES[engine](), stop_tokens=())


def demo_method(
    method: str, pair: Any, target: PreTrainedModel, case: Case, device: str, dtype: torch.dtype
) -> Callable[..., Generation]:
    """Of the enlarged demo pair."""
    small = grown(pair.draft, case._replace(size=""), device, dtype)
    if method == "transformers":
        return baseline.generate
    if method.startswith("transformers"):
        return partial(baseline.generate, assistant=small)
    name, engine = method.rsplit(", ", 1)
    tree = Widths((4, 2, 2, 1)) if "tree" in name else Chain(4)
    drafter: Any = None
    match DRAFTERS[name]:
        case "small":
            drafter = ModelDrafter(small, tree)
        case "large":
            drafter = ModelDrafter(grown(pair.draft, case, device, dtype), tree)
        case "layers":
            drafter = LayerSkipDrafter((*SKIPPED, *range(6, target.config.num_hidden_layers)), tree=tree)
        case "heads":
            drafter = MedusaDrafter(widen(pair.heads, target.config.hidden_size).to(target.device, target.dtype), tree)
    return partial(specdec.generate, drafter=drafter, engine=ENGINES[engine](), stop_tokens=())


def grown(model: Any, case: Case, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the demo pair on the device, and of the case's size if it has one; drafts are at most of 1B."""
    model = model.to(device=device, dtype=dtype)
    if case.size:
        size = "1B" if case.size == "8B" and model.config.num_hidden_layers == 1 else case.size
        layers, intermediate, hidden = SIZES[size]
        model = enlarge(model, layers, intermediate, hidden_size=hidden)
    model.config.max_position_embeddings = 2 * case.context + 1024  # rotary positions know no limit of their own
    model.generation_config.eos_token_id = None
    return specdec.join_weights(model)


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


class Timed(NamedTuple):
    """A run and the seconds from the call to its return."""

    out: Generation
    wall: float

    @property
    def decoding(self) -> float:
        """Seconds of the wall clock, of the host's, but for the prefill's: of ours and of transformers' runs alike."""
        return self.wall - self.out.trace.prefill_seconds

    @property
    def speed(self) -> float:
        """Tokens per second of it."""
        return self.out.summary()["tokens"] / self.decoding


def timed(run: Callable[..., Generation], target: PreTrainedModel, prompts: list[Tensor], new_tokens: int) -> Timed:
    finish(target.device)
    began = time.perf_counter()
    out = run(target, prompts, max_new_tokens=new_tokens)
    finish(target.device)
    return Timed(out, time.perf_counter() - began)


def row(first: Timed, runs: list[Timed], floor: float) -> dict[str, Any]:
    """The figures of one method; times in milliseconds per step, the median run.

    Args:
        first: the run in which kernels are compiled and graphs captured.
        floor: seconds that reading the target's weights takes.
    """
    summaries, speeds = [run.out.summary() for run in runs], [run.speed for run in runs]
    steps = summaries[0]["target_forwards"]
    draft, verify, other = (
        1e3 * statistics.median(s[f"{part}_seconds"] for s in summaries) / steps
        for part in ("draft", "verify", "other")
    )
    wall = statistics.median(run.wall for run in runs)
    return {
        "tokens/s": statistics.median(speeds),
        "spread": max(speeds) / min(speeds),
        "acceptance length": summaries[0]["acceptance_length"],
        "step ms": 1e3 * statistics.median(run.decoding for run in runs) / steps,
        "draft ms": draft,
        "verify ms": verify,
        "other ms": other,
        "weight floor ms": 1e3 * floor,
        "verify / weight floor": verify / (1e3 * floor),
        "run s": wall,
        "first use s": first.wall - wall,
    }


def profiled(run: Callable[..., Generation], target: PreTrainedModel, prompts: list[Tensor]) -> dict[str, Any]:
    """Kernels per step, the share of the time in which the device is at work, and each kernel's, over a few steps."""
    if target.device.type != "cuda":
        return {}
    steps = specdec.stream(target, prompts, max_new_tokens=96, **getattr(run, "keywords", {}))
    for _ in range(PROFILED):  # shapes that are new are captured
        next(steps)
    finish(target.device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        for _ in range(PROFILED):
            next(steps)
        finish(target.device)
        wall = time.perf_counter() - began
    kernels = [event for event in seen.events() or () if str(event.device_type).endswith("CUDA")]
    busy = sum(event.device_time for event in kernels) / 1e6
    return {"kernels per step": len(kernels) / PROFILED, "device busy": busy / wall, "kernels": by_kernel(kernels)}


def by_kernel(events: list[Any]) -> list[dict[str, Any]]:
    """The kernels that take most of a step, in microseconds per step, and all the others together."""
    calls, seconds = Counter(event.name for event in events), defaultdict[str, float](float)
    for event in events:
        seconds[event.name] += event.device_time / PROFILED
    first = sorted(seconds, key=lambda name: -seconds[name])[:LISTED]
    listed = [{"kernel": name[:80], "calls": calls[name] / PROFILED, "us": seconds[name]} for name in first]
    rest = [name for name in seconds if name not in first]
    others = {"calls": sum(calls[n] for n in rest) / PROFILED, "us": sum(seconds[n] for n in rest)}
    return [*listed, {"kernel": f"{len(rest)} others", **others}]


if __name__ == "__main__":
    main()
