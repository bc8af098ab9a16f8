"""Drafters that were trained on the same text with the same compute, side by side: acceptance by depth and by place.

    for net in eagle3 dspark dflash eagle medusa
        python experiments/train_drafter.py net=$net folder=FOLDER/$net flops=6e13 texts_from=TEXTS
    python experiments/distill_draft.py folder=FOLDER/model task.count=6144 task.one_in=2 scratch=true 'seeds=[0]' steps=3981 \
        lr=0.002 '~losses.cross_entropy' '~losses.lk' '~losses.tau_token' '~losses.tau_block' log.path=FOLDER/model/result.json
    model="{_target_: transformers.AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path: FOLDER/model/kl_0}"
    for law in greedy temperature
        python experiments/benchmark.py experiment=equal_cost trained=FOLDER sampling=$law log.path=FOLDER/speeds_$law.json
        python experiments/benchmark.py 'methods=[autoregressive,chain,tree]' methods.{chain,tree}.drafter.model="$model" \
            sampling=$law repeats=2 task.per_task=4 ceilings=false log.path=FOLDER/speeds_${law}_model.json
    python -m experiments.studies.equal_cost FOLDER

Decodes the demo prompts with chains of 4, and with the tree of at most 22 nodes, of those tried, of which most is expected to
be accepted, as the laws along the target's texts foretell it. What is known of each drafter is kept in
`experiments/results/equal_cost/`, a file each, and not measured again while that is there; `experiments/results/equal_cost.md`
is made of these files.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import specdec
from experiments.bench.report import interval, markdown, mean, per_prompt
from experiments.bench.results import ROOT, Json, provenance
from specdec import Generation, Sampling
from specdec.drafters import (
    DFlashDrafter,
    Drafter,
    DSparkDrafter,
    Eagle3Drafter,
    EagleDrafter,
    MedusaDrafter,
    ModelDrafter,
    TreeDrafter,
)
from specdec.drafters.block import BlockDrafter
from specdec.drafters.feature import FeatureDrafter
from specdec.prediction import acceptance_length, texts
from specdec.trees import Chain, TreePolicy, Widths

PAIR = specdec.demo.load()
PROMPTS = [torch.tensor(PAIR.tokenizer(prompt.text)["input_ids"]) for prompt in PAIR.prompts]
SAMPLINGS = {"greedy": Sampling(), "T = 1": Sampling(1.0)}
TREES = [(4, 2, 1), (3, 2, 1, 1), (2, 2, 1, 1), (4, 1, 1, 1), (6, 2), (3, 3)]
NAMES = {"eagle3": "EAGLE-3", "dspark": "DSpark", "dflash": "DFlash", "eagle": "EAGLE-1 (as an MTP layer)", "medusa": "Medusa",
         "model": "small model", "eagle3_bundled": "EAGLE-3, bundled", "bundled": "Medusa, bundled",
         "draft": "small model, bundled"}  # fmt: skip
KINDS = {"eagle3": Eagle3Drafter, "dspark": DSparkDrafter, "dflash": DFlashDrafter, "eagle": EagleDrafter,
         "medusa": MedusaDrafter}  # fmt: skip
RESULTS = ROOT / "experiments" / "results" / "equal_cost"
MODEL = {"chain": "model, chain", "tree": "model, tree"}  # as a benchmark of one draft model names its methods
BUNDLED: dict[str, Callable[[TreePolicy], TreeDrafter]] = {  # trained before: see specdec/demo/CARD.md
    "eagle3_bundled": lambda tree: specdec.demo.eagle3(PAIR.target, tree),
    "bundled": lambda tree: MedusaDrafter(PAIR.heads, tree),
    "draft": lambda tree: ModelDrafter(PAIR.draft, tree),
}
TOKENS, PLACES = 64, (16, 32, 48, 64)


def drafter(name: str, folder: Path, tree: TreePolicy) -> TreeDrafter:
    """The drafter that was trained in `folder`/`name`."""
    if name == "model":
        return ModelDrafter(AutoModelForCausalLM.from_pretrained(folder / "model" / "kl_0").eval(), tree)
    if name in BUNDLED:
        return BUNDLED[name](tree)
    return KINDS[name].from_pretrained(folder / name / "net", PAIR.target, tree)


def best_tree(name: str, folder: Path) -> Widths:
    """Of `TREES`, the one of which most is expected to be accepted at temperature 1."""
    made = drafter(name, folder, Chain(1))
    options = {"sampling": SAMPLINGS["T = 1"], "max_new_tokens": TOKENS, "stop_tokens": (), "depth": 4}
    found = [
        text
        for seed, prompt in enumerate(PROMPTS[::8])
        for text in texts(PAIR.target, made, prompt, 1, seed=seed, **options)
    ]
    deepest = made.net.depth if isinstance(made, BlockDrafter) else 4
    trees = [Widths(widths) for widths in TREES if len(widths) <= deepest]
    return max(trees, key=lambda tree: acceptance_length(found, tree))


@contextmanager
def counted(each: Drafter) -> Iterator[list[int]]:
    """Counts the passes of a drafter's network: over what the target accepted, and over levels or blocks."""
    net, passes = each.models[0], [0]
    match each:
        case FeatureDrafter():
            names = ["step"]
        case BlockDrafter():
            names = ["follow", "block"]
        case _:
            names = ["forward"]

    def noting(method: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            passes[0] += 1
            return method(*args, **kwargs)

        return noted

    for name in names:
        setattr(net, name, noting(getattr(net, name)))
    try:
        yield passes
    finally:
        for name in names:
            delattr(net, name)


def by_place(out: Generation) -> list[float]:
    """Tokens per step, of steps that begin among the first 16 new tokens, the next 16, and so on."""
    written, tokens, steps = [0] * len(out.tokens), np.zeros(len(PLACES)), np.zeros(len(PLACES))
    for step in out.trace.steps:
        for text, emitted in zip(step.held, step.emitted, strict=True):
            if emitted:
                part = int(np.searchsorted(PLACES, written[text], side="right"))
                tokens[part] += emitted
                steps[part] += 1
                written[text] += emitted
    return (tokens / steps).round(3).tolist()


def decoded(each: Drafter, sampling: Sampling, prompts: list[Tensor]) -> dict[str, Any]:
    with counted(each) as passes:
        out = specdec.generate(PAIR.target, prompts, each, sampling=sampling, max_new_tokens=TOKENS, stop_tokens=())
    summary = out.summary()
    return {
        "acceptance_length": mean(per_prompt([out])),
        "acceptance_rate": [round(rate, 3) for rate in summary["acceptance_rate"]],
        "by_place": by_place(out),
        "passes": passes[0] / summary["target_forwards"],
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    names = [name for name in NAMES if name in BUNDLED or (folder / name).exists()]
    for name in tqdm([name for name in names if not kept(name).exists()]):
        source = provenance("-m", ["experiments.studies.equal_cost", folder.name], {}, "cpu")
        Json(str(kept(name))).write({**source, **known(name, folder)})
        if name not in BUNDLED:
            shutil.copy(folder / name / "result.json", RESULTS / f"{name}_training.json")
    for speeds in folder.glob("speeds_*.json"):
        shutil.copy(speeds, RESULTS)
    found = {name: json.loads(kept(name).read_text()) for name in NAMES if kept(name).exists()}
    RESULTS.with_suffix(".md").write_text(page(found, speeds_by_law()), "utf-8")


def kept(name: str) -> Path:
    """The file that tells what is known of a drafter."""
    return RESULTS / f"{name}.json"


def known(name: str, folder: Path) -> dict[str, Any]:
    """What training took, and acceptance."""
    trees = {"chain of 4": Chain(4), "tree": best_tree(name, folder)}
    return {
        "trained": trained(name, folder),
        "parameters": sum(p.numel() for p in drafter(name, folder, Chain(4)).models[0].parameters()),
        "tree": list(trees["tree"].widths),
        "prompts": len(PROMPTS),
        "decoded": {
            f"{shape}, {law}": decoded(drafter(name, folder, tree), sampling, PROMPTS)
            for shape, tree in trees.items()
            for law, sampling in SAMPLINGS.items()
        },
    }


def speeds_by_law() -> dict[str, dict[str, Any]]:
    """What was timed, of all runs."""
    found: dict[str, dict[str, Any]] = {law: {} for law in SAMPLINGS}
    for file in sorted(RESULTS.glob("speeds_*.json")):
        result = json.loads(file.read_text())
        law = "greedy" if result["options"]["sampling"]["temperature"] == 0 else "T = 1"
        figures: dict[str, Any] = result["figures"]
        found[law].update((MODEL.get(key, key), row) for key, row in figures.items())
    return found


def trained(name: str, folder: Path) -> dict[str, Any] | None:
    """What training took, and what it foretold."""
    if name in BUNDLED:
        return None
    result = json.loads((folder / name / "result.json").read_text())
    if name == "model":
        row = result["figures"]["kl"]
        return {"commit": result["commit"], "flops": row["flops"], "steps": row["steps"]}
    keys = ("commit", "flops", "steps")
    return {**{key: result[key] for key in keys}, **{key: result["figures"].get(key) for key in ("expected", "served")}}


def page(found: dict[str, Any], speeds: dict[str, Any]) -> str:
    """The figures as tables."""
    shapes = [f"{shape}, {law}" for shape in ("chain of 4", "tree") for law in SAMPLINGS]
    lengths = [["tokens per forward (95 % CI)", "parameters", "TFLOP", *shapes, "tree"]]
    rates = [["accepted at depth 1, 2, ..., chain of 4", *SAMPLINGS, "passes of the network per step: chain, tree"]]
    places = [["tokens per forward, T = 1, steps begun among new tokens", "1-16", "17-32", "33-48", "49-64"]]
    foretold = [["chain of 4 after held-out beginnings, T = 1", "foretold by the laws", "served"]]
    faster = [
        ["speed-up (95 % CI)", *(f"{shape}, {law}" for law in SAMPLINGS for shape in ("chain of 4", "tree 4-2-1"))]
    ]
    for name, row in found.items():
        its, label = row["decoded"], NAMES[name]
        cells = [interval(its[shape]["acceptance_length"], digits=2) for shape in shapes]
        cost = f"{row['trained']['flops'] / 1e12:.0f}" if row["trained"] else "-"
        lengths.append([label, f"{row['parameters']:,}", cost, *cells, "-".join(map(str, row["tree"]))])
        chain = [" ".join(f"{rate:.2f}" for rate in its[f"chain of 4, {law}"]["acceptance_rate"]) for law in SAMPLINGS]
        passes = ", ".join(f"{its[f'{shape}, T = 1']['passes']:.1f}" for shape in ("chain of 4", "tree"))
        rates.append([label, *chain, passes])
        places.append([label, *(f"{length:.2f}" for length in its["chain of 4, T = 1"]["by_place"])])
        if row["trained"] and row["trained"].get("expected"):
            foretold.append([label, *(interval(row["trained"][key], digits=3) for key in ("expected", "served"))])
        timed = [speeds[law].get(f"{name}, {shape}") for law in SAMPLINGS for shape in ("chain", "tree")]
        if all(timed):
            faster.append([label, *(interval(each["speed_up"], digits=2) for each in timed)])
    tables = [lengths, rates, places, foretold, faster]
    about = (
        "# Drafters of equal cost\n\nEach was trained on the same text of the demo target's own making with the same floating "
        f"point operations (what is bundled: before, see the demo pair's card). It drafts for {len(PROMPTS)} prompts that "
        f"nothing was trained on, {TOKENS} tokens each. Intervals are over prompts. The trees are those of at most 22 nodes of "
        f"{len(TREES)} tried that the laws foretell most of at temperature 1. How: `experiments/studies/equal_cost.py`."
    )
    return "\n\n".join([about, *map(markdown, tables)]) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
