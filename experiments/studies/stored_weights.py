"""What products and forward passes cost on this CPU by how weights are stored, and how near that is to reading them.

    OMP_NUM_THREADS=1 python -m experiments.studies.stored_weights --output experiments/results/stored_weights_cpu.json

Writes that file, the tables beside it as .md, and the picture as .svg:

- A few tokens times matrices of SmolLM2 and one of an 8B model, as many of each as are many times the cache: with our ops, and
  with what torch has for these formats. The floor is the time in which the fastest of `specdec.tuning.reading` goes
  through the same matrices in float32 in that round, times the share of their bytes that the format stores.
- Eager passes of SmolLM2 over a few tokens after a text, with the products of our runs, and these products alone, beside the
  same floor.

What the formats change in texts: `quantised_self`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

import specdec
from experiments.bench.report import markdown
from experiments.bench.results import Json, provenance
from experiments.studies.hot_paths import READ, Timed, measure, readings
from specdec.display.picture import PALETTE
from specdec.display.plots import new_axes
from specdec.models.cache import cache_argument
from specdec.models.products import few_rows
from specdec.models.storable import PLAIN
from specdec.models.stored_layers import FORMATS
from specdec_kernels import linear

SIZES = {"SmolLM2": [(576, 576), (1536, 576), (576, 1536), (49152, 576)], "8B": [(4096, 4096)]}
TOKENS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 200  # tokens of the text before a pass
MODEL = "a pass of SmolLM2"
PASSES = ("float32", PLAIN, *FORMATS)


def products(rows: int, columns: int) -> tuple[Timed, dict[str, float]]:
    """Calls that multiply all matrices of a size with a few tokens; and which share of float32's bytes each way reads."""
    weights = [torch.randn(rows, columns) / columns**0.5 for _ in range(max(READ // (4 * rows * columns), 1))]
    ways, share = _torchs(weights), {}
    ways["float32, ours"] = lambda x: [linear(x, weight) for weight in weights]
    for name, format in FORMATS.items():
        stored = [format.pack(weight) for weight in weights]
        ways[name] = partial(_multiplied, format.linear, stored, rows)
        share[name] = sum(part.nbytes for part in stored[0]) / weights[0].nbytes
    timed = readings(weights)
    for count in TOKENS:
        x = torch.randn(count, columns)
        timed |= {f"{count} | {name}": partial(way, x) for name, way in ways.items()}
    return timed, share


def _multiplied(way: Any, stored: list[tuple[Tensor, ...]], rows: int, x: Tensor) -> list[Tensor]:
    return [way(x, *each, rows) for each in stored]


def _torchs(weights: list[Tensor]) -> dict[str, Any]:
    """Products of torch, with activations in the type that each wants; for 8-bit ones they are rounded, token by token."""
    halves = [weight.bfloat16() for weight in weights]
    scales = [weight.abs().amax(1) / 127 for weight in weights]
    whole = [(weight / scale[:, None]).round().to(torch.int8) for weight, scale in zip(weights, scales, strict=True)]
    pairs = list(zip(whole, scales, strict=True))

    def integers(x: Tensor) -> list[Tensor]:
        size = x.abs().amax(1, True) / 127
        rounded = (x / size).round().to(torch.int8)
        return [torch.ops.aten._int_mm(rounded, each.T).float() * size * scale for each, scale in pairs]

    return {
        "float32, torch": lambda x: [x @ weight.T for weight in weights],
        "bf16, torch": lambda x: [x.bfloat16() @ half.T for half in halves],
        "int8, torch's pack": lambda x: [
            torch.ops.aten._weight_int8pack_mm(x.bfloat16(), each, scale.bfloat16()) for each, scale in pairs
        ],
        "int8, torch's _int_mm": integers,
    }


def passes() -> tuple[Timed, dict[str, float]]:
    """Forward passes of SmolLM2 after a text, and their products alone; and which share of float32's bytes each reads."""
    timed: Timed = {}
    share: dict[str, float] = {}
    for name in PASSES:
        model = specdec.demo.smollm2.load().target
        if name == "float32":
            weights = [part.weight.detach() for part in model.modules() if isinstance(part, nn.Linear)]
            timed |= readings(weights)
        else:
            specdec.store_weights(model, name)
        layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
        stored = sum(part.nbytes for layer in layers for part in layer.state_dict().values())
        share[name] = share[f"{name}, products"] = stored / sum(weight.nbytes for weight in weights)
        cache = DynamicCache(config=model.config)
        model(torch.arange(CONTEXT)[None] + 100, **{cache_argument(model): cache}, logits_to_keep=1)
        for count in TOKENS:
            inputs = {width: torch.randn(1, count, width) for width in {layer.in_features for layer in layers}}
            timed[f"{count} | {name}"] = partial(_pass, model, cache, torch.arange(count)[None] + 500)
            timed[f"{count} | {name}, products"] = partial(_products, layers, inputs)
    return timed, share


def _pass(model: Any, cache: DynamicCache, ids: Tensor) -> None:
    with few_rows(ids.device):
        model(ids, **{cache_argument(model): cache})
    cache.crop(-ids.shape[1])


def _products(layers: list[nn.Linear], inputs: dict[int, Tensor]) -> list[Tensor]:
    with few_rows(torch.device("cpu")):
        return [layer(inputs[layer.in_features]) for layer in layers]


def measured(rounds: int) -> dict[str, Any]:
    """Figures by title, with the share of float32's bytes that each format reads."""
    found: dict[str, Any] = {}
    for rows, columns in tqdm([size for sizes in SIZES.values() for size in sizes], leave=False):
        timed, share = products(rows, columns)
        figures = measure(timed, rounds, "reading")
        count = max(READ // (4 * rows * columns), 1)
        found[f"{rows} x {columns}"] = {"figures": figures, "share": share, "matrices": count}
    timed, share = passes()
    found[MODEL] = {"figures": measure(timed, rounds, "reading"), "share": share}
    return found


def table(title: str, part: dict[str, Any]) -> str:
    """Microseconds of one matrix, or milliseconds of a pass, by way and tokens; with ours in units of their floor too."""
    figures, share, whole = part["figures"], part["share"], title == MODEL
    unit = 1.0 if whole else 1e3 / part["matrices"]
    names = dict.fromkeys(name.split(" | ")[1] for name in figures if not name.startswith("reading"))
    rows = [[name, *(_cell(figures[f"{n} | {name}"], unit, share.get(name)) for n in TOKENS)] for name in names]
    head = f"{title}: {'milliseconds' if whole else 'microseconds'} (times the floor)"
    return markdown([[head, *map(str, TOKENS)], *rows])


def _cell(row: dict[str, float], unit: float, share: float | None) -> str:
    spent = f"{row['ms'] * unit:.0f}" if unit > 1 else f"{row['ms']:.1f}"
    return spent if share is None else f"{spent} ({row['ratio'] / share:.1f})"


def picture(found: dict[str, Any]) -> Any:
    """Time of a pass by tokens and format, and what reading the format's bytes takes."""
    figures, share, axes = found[MODEL]["figures"], found[MODEL]["share"], new_axes(None)
    floor = min(row["ms"] for name, row in figures.items() if name.startswith("reading"))
    for name, colour in zip(PASSES, PALETTE, strict=False):
        axes.plot(TOKENS, [figures[f"{n} | {name}"]["ms"] for n in TOKENS], "o-", color=colour, label=name)
        axes.axhline(floor * share[name], color=colour, linestyle=":", linewidth=1)
    axes.set(title="A pass of SmolLM2 on one CPU core (dotted: reading its bytes)", xlabel="tokens")
    axes.set(ylabel="time (ms)", xscale="log", yscale="log")
    axes.set_xticks(TOKENS, map(str, TOKENS))
    axes.set_yticks([4, 8, 16, 32, 64, 128, 256], ["4", "8", "16", "32", "64", "128", "256"])
    axes.minorticks_off()
    axes.legend()
    return axes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("outputs/stored_weights.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about = {"rounds": options.rounds, "output": str(options.output)}
    source = provenance("-m", ["experiments.studies.stored_weights", "--output", str(options.output)], about, "cpu")
    with torch.inference_mode():
        found = measured(options.rounds)
    Json(str(options.output)).write({**source, "found": found})
    page = "\n\n".join(["# Weights as they are stored", *(table(title, part) for title, part in found.items()), ""])
    options.output.with_suffix(".md").write_text(page, "utf-8")
    picture(found).figure.savefig(options.output.with_suffix(".svg"), metadata={"Date": None})
    print(page)


if __name__ == "__main__":
    main()
