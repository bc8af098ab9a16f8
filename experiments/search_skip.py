"""Finds layers that a target should leave out when it drafts for itself, by predicted speed-up. Resumes when stopped.

    python experiments/search_skip.py                                   # the demo target: minutes on one CPU core
    python experiments/search_skip.py target=hub target.target=NAME task=file task.path=FILE budget=0.5
    python experiments/benchmark.py --config-dir outputs/skip drafter=found

Every second prompt is for the search; the others are decoded with what was found and with the best early exit that was tried.
If nothing is predicted above the speed without a draft, no drafter is written, and the search ends with that error. Settings
are in `conf/search_skip.yaml`.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("search_skip", "search_skip")

import json
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

import specdec
from experiments.bench.inputs import Setting, begin
from experiments.bench.measure import rounds, uninterrupted
from experiments.bench.report import figures, table
from experiments.bench.results import Json, whole
from specdec.drafters import LayerSkipDrafter
from specdec.drafters.layer_skip import decoder_layers, skippable
from specdec.theory import CostCurve
from specdec.training.self_distillation import continuations
from specdec.training.skip_search import LayerCosts, Rehearsal, Skip, Trial, measure_layer_costs, predict, search
from specdec.trees import Chain

MEASURED = [
    "target",
    "sampling",
    "task",
    "depth",
    "roots",
    "new_tokens",
    "dtype",
    "device",
    "threads",
]  # what it depends on


def main(config: DictConfig) -> None:
    setting = begin("experiments/search_skip.py", config)
    target = setting.models.target
    folder, layers, free = Path(config.folder), len(decoder_layers(target)), skippable(target)
    most = min(len(free), layers - 1)
    options: Any = OmegaConf.to_container(config, resolve=True)
    known = Known(folder / "measured.json", {key: options[key] for key in MEASURED})
    rehearsal = Rehearsal(target, texts(setting, config), config.depth, setting.sampling)
    costs = known.costs(partial(measure_layer_costs, target, config.depth + 1, config.new_tokens))
    least = costs.least_skipped(config.budget, layers, most)

    def trial(skip: Skip) -> Trial:
        return predict(skip, known.reach(skip, rehearsal), costs.keeping(layers - len(skip)))

    attempts = islice(search(trial, free, least, most), config.evaluations)
    tried = [t for t in tqdm(attempts, total=config.evaluations, desc="sets of layers") if len(t.skip) >= least]
    found = {"found": best(tried, config)}
    if exits := [t for t in tried if t.skip == frozenset(range(layers - len(t.skip), layers))]:
        found["early exit"] = best(exits, config)
    rows = {name: {**row(t), "layers": layers} for name, t in found.items()}
    result = {**setting.source, "sets_tried": len(tried), "costs": known.saved["costs"], "predicted": rows}
    if refusal := why_not(found["found"], layers, len(tried)):
        raise SystemExit(f"{refusal} {setting.log.write({**result, 'refused': refusal})}")
    option = folder / "drafter" / f"{config.name}.yaml"
    write_option(option, found["found"], setting.source)
    if config.repeats:
        result["figures"] = decode(setting, config, found)
        print(table(result["figures"]))
    for name, values in rows.items():
        print(f"{name}: {values}")
    print(option, setting.log.write(result))


class Known:
    """What was measured so far, in a file."""

    def __init__(self, path: Path, settings: Any):
        self.path, self.saved = path, {"settings": settings, "costs": None, "reach": {}}
        if path.exists():
            self.saved = json.loads(path.read_text("utf-8"))
            if self.saved["settings"] != settings:
                raise SystemExit(f"{path} is of a search with other settings: choose another folder, or delete it.")

    def costs(self, measure: Callable[[], LayerCosts]) -> LayerCosts:
        if self.saved["costs"] is None:
            costs = measure()
            self.saved["costs"] = {**vars(costs), "verify": vars(costs.verify)}
            self._save()
        costs = self.saved["costs"]
        return LayerCosts(**{**costs, "verify": CostCurve(**costs["verify"])})

    def reach(self, skip: Skip, rehearsal: Rehearsal) -> list[float]:
        key = " ".join(map(str, sorted(skip)))
        if key not in self.saved["reach"]:
            self.saved["reach"][key] = rehearsal.reach(skip)
            self._save()
        return self.saved["reach"][key]

    def _save(self) -> None:
        Json(str(self.path)).write(self.saved)


def texts(setting: Setting, config: DictConfig) -> list[torch.Tensor]:
    """Every second prompt with what the target makes of it, cut after `depth` tokens from each of `roots` places."""
    prompts = setting.prompts[::2]
    options: dict[str, Any] = {"new_tokens": config.new_tokens, "sampling": setting.sampling}
    whole = [text for part in continuations(setting.models.target, prompts, **options) for text in part]
    cut = []
    for prompt, text in zip(prompts, whole, strict=True):
        first, last = len(prompt) + config.depth, len(text)
        ends = torch.linspace(first, last, config.roots).long().unique() if last >= first else ()
        cut += [text[:end] for end in ends]
    if not cut:
        raise SystemExit(
            f"depth={config.depth}: the target ends every text before that; lower it or choose other prompts."
        )
    return cut


def best(tried: list[Trial], config: DictConfig) -> Trial:
    if not tried:
        raise SystemExit(f"evaluations={config.evaluations}: no set within the budget was tried; allow more.")
    return max(tried, key=lambda t: t.speed_up)


def why_not(trial: Trial, layers: int, tried: int) -> str:
    """Why the best set is of no use, if no speed-up is predicted for it; otherwise nothing."""
    if trial.speed_up > 1:
        return ""
    return (
        f"The best of {tried} sets leaves out {len(trial.skip)} of {layers} layers, and is predicted at {trial.speed_up:.2f} "
        f"of the speed without a draft (acceptance length {trial.acceptance_length:.2f}), so no drafter is written. Draft with "
        "text (drafter=suffix) or with trained heads or a small model, try more sets (evaluations), or another dtype: a pass "
        "over several tokens may cost less there."
    )


def row(trial: Trial) -> dict[str, Any]:
    """The figures of one set."""
    chosen = {"skip": sorted(trial.skip), "chain": trial.length, "reach": [round(r, 3) for r in trial.reach]}
    return {**chosen, "acceptance_length": trial.acceptance_length, "speed_up": trial.speed_up}


def decode(setting: Setting, config: DictConfig, found: dict[str, Trial]) -> dict[str, Any]:
    """Figures of the other prompts, decoded without a drafter and with these."""
    drafters = {name: LayerSkipDrafter(sorted(t.skip), tree=Chain(t.length)) for name, t in found.items()}
    methods = {"none": specdec.generate, **{name: partial(specdec.generate, drafter=d) for name, d in drafters.items()}}
    prompts = setting.prompts[1::2]
    batches = [prompts[i : i + config.batch] for i in range(0, len(prompts), config.batch)]
    options: dict[str, Any] = {"sampling": setting.sampling, "max_new_tokens": config.new_tokens}
    return figures(uninterrupted(rounds(setting.models.target, methods, batches, repeats=config.repeats, **options)))


def write_option(path: Path, trial: Trial, source: dict[str, Any]) -> None:
    """The set and its chain, as an option of the group `drafter`."""
    tree = {"_target_": "specdec.trees.Chain", "length": trial.length}
    option = {
        "_target_": "specdec.drafters.LayerSkipDrafter",
        "skip": sorted(trial.skip),
        "exit_layer": None,
        "tree": tree,
    }
    head = f"# {source['command']}\n# commit {source['commit']}, {source['date']}; predicted: acceptance length "
    head += f"{trial.acceptance_length:.2f}, speed-up {trial.speed_up:.2f}\n"
    with whole(path) as file:
        file.write_text(head + yaml.safe_dump(option, sort_keys=False, default_flow_style=None), "utf-8")
