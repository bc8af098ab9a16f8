"""Plans of `specdec.tune` held to account: on prompts that they have not seen, against the best of an exhaustive sweep.

    python -m experiments.studies.plans FOLDER --prompts PROMPTS           # hours: 12 settings, each kept when it is done
    python -m experiments.studies.plans FOLDER --only 'demo, T = 0, batch 1' --seconds 20 --rounds 1 --prompts-each 4

In each setting (three targets, greedy and T = 1, batch 1 and 8) a plan is made from half of the prompts. On the other half,
every drafter is decoded with every tree of `SHAPES` and every rule, in turns: all of them on the first quarter, the fastest
third on the whole. Then the best of this sweep, the plan's choice and decoding without a draft once more: so the best has no
luck of the draw. Speeds are paired by groups of prompts.
What is stopped goes on with the setting that it was at. Writes `plans.json` and `plans.md` to the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import specdec
from experiments.bench.models import smollm2
from experiments.bench.real_prompts import real
from experiments.bench.report import markdown
from experiments.bench.results import Json, provenance
from experiments.demo_pair import enlarge
from specdec import Plan, Sampling
from specdec.arguments import as_engine, as_target
from specdec.drafters import Paused, TreeDrafter
from specdec.rules import SiblingRejection
from specdec.tuning.checking import Check
from specdec.tuning.conditions import Conditions, rules
from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import Candidate, can_be_replayed
from specdec.tuning.offers import Offer, given, own_offers
from specdec.tuning.search import suited, tree_of
from specdec.tuning.tables import shape
from specdec.tuning.tune import groups, steadily

SHAPES = [
    (1,),
    (1, 1),
    (1, 1, 1),
    (1,) * 4,
    (1,) * 5,
    (1,) * 6,
    (2,),
    (3,),
    (2, 2),
    (3, 2),
    (4, 2),
    (2, 2, 1),
    (4, 2, 1),
]
NEW_TOKENS = 64
LOSS, LEVEL = 0.08, 0.9  # the upper end of the interval of the loss is to be at most this
HEADER = ["setting", "plan", "best of the sweep", "plan over the best (90 %)", "loss, upper end", "speed-up: predicted",
          "on other prompts (95 %)", "error", "held"]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One of the twelve."""

    target: str
    temperature: float
    batch: int

    def __str__(self) -> str:
        return f"{self.target}, T = {self.temperature:g}, batch {self.batch}"


SETTINGS = [Setting(*each) for each in product(("demo", "enlarged", "smollm2"), (0.0, 1.0), (1, 8))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", help="with the files of experiments/bench/real_prompts.py, for smollm2")
    parser.add_argument("--only", nargs="*", help="of these settings")
    parser.add_argument("--seconds", type=float, help="of each search (default: 60, with smollm2 900)")
    parser.add_argument("--rounds", type=int, default=3, help="of the last comparison")
    parser.add_argument(
        "--prompts-each", type=int, default=16, help="that plans are made from, and that they are judged by"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    options = {name: str(value) for name, value in vars(asked).items()}
    source = provenance("-m", ["experiments.studies.plans", *sys.argv[1:]], options, "cpu")
    files = {setting: asked.folder / f"{setting}.json".replace(" ", "_") for setting in SETTINGS}
    with tqdm([each for each in SETTINGS if not asked.only or str(each) in asked.only], desc="settings") as bar:
        for setting in bar:
            if not files[setting].exists():
                Json(str(files[setting])).write({**source, **judged(setting, asked, bar.set_postfix_str)})
    rows = [json.loads(file.read_text("utf-8")) for file in files.values() if file.exists()]
    Json(str(asked.folder / "plans.json")).write({**source, "settings": rows})
    (asked.folder / "plans.md").write_text(page(rows), "utf-8")
    print(page(rows))


def judged(setting: Setting, asked: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """A plan, the sweep, and both on prompts that the plan has not seen."""
    models, prompts, drafters = loaded(setting.target, asked)
    sampling, engine = Sampling(setting.temperature), as_engine("eager")
    seconds = asked.seconds or (900 if setting.target == "smollm2" else 60)
    plan = specdec.tune(
        models.target, prompts[::2], drafters, sampling=sampling, max_new_tokens=NEW_TOKENS, batch_size=setting.batch,
        seconds=seconds,
    )  # fmt: skip
    conditions = Conditions(as_target(models.target), sampling, setting.batch, lambda: engine, NEW_TOKENS)
    held = groups(prompts[1::2], setting.batch)
    swept = [*candidates(plan, given(drafters), conditions)]
    with steadily(conditions.target.device):
        first = fastest(swept, held[: max(len(held) // 4, 1)], conditions, say)
        whole = fastest([each for each, _ in first[: max(len(first) // 3, 2)]], held, conditions, say)
        best, speed = whole[0]
        chosen = [] if plan.drafter is None else [plan.rows[0].candidate]
        last = rounds(Check([best, *chosen], conditions), held, asked.rounds, say)
    over = last.over(2 if chosen else 0, 1 if speed > 1 else 0, LEVEL)  # the best may be to draft nothing
    speedup = last.over(2, 0) if chosen else Estimate(1.0, 1.0, 1.0)
    predicted = plan.speedup.predicted
    return {
        "setting": str(setting),
        "plan": {
            "name": plan.name,
            "drafter": str(plan.drafter),
            "rule": type(plan.rule).__name__,
            "verdict": plan.verdict,
        },
        "reason": plan.reason,
        "best": named(best) if speed > 1 else "autoregressive",
        "swept": {"on a quarter": told(first), "on all": told(whole)},
        "over_best": vars(over),
        "speedup": vars(speedup),
        "predicted": None if predicted is None else vars(predicted),
        "noise": None if last.noise is None else vars(last.noise),
    }


def loaded(target: str, asked: argparse.Namespace) -> tuple[Any, list[torch.Tensor], dict[str, Any]]:
    """Models, prompts as tokens, and drafters."""
    count = 2 * asked.prompts_each
    if target == "smollm2":
        models = smollm2()
        turns = [prompt.turns[0] for prompt in real(asked.prompts, None, -(-count // 8))][:count]
        messages = [[{"role": "user", "content": turn}] for turn in turns]
        template = models.tokenizer.apply_chat_template
        ids = [template(each, add_generation_prompt=True, return_dict=False) for each in messages]
        return models, [torch.tensor(each) for each in ids], {}
    pair = specdec.demo.load()
    models = pair if target == "demo" else enlarge.load(24, 2560)
    step = max(len(pair.prompts) // count, 1)
    ids = [pair.tokenizer(prompt.text)["input_ids"] for prompt in pair.prompts[::step][:count]]
    return models, [torch.tensor(each) for each in ids], {"draft": models.draft, "heads": models.heads}


def candidates(plan: Plan, offers: list[Offer], conditions: Conditions) -> Iterator[Candidate]:
    """All drafters with all trees and rules; layers are left out as the plan's search left them out."""
    ours, _ = own_offers(conditions.target, ("ngram", "suffix"))
    layers = next((row.candidate.drafter for row in plan.rows if row.candidate.name == "layers"), None)
    for offer in [*offers, *ours, *([Offer("layers", layers)] if layers is not None else [])]:
        if can_be_replayed(offer.drafter):
            yield Candidate(offer.name, offer.drafter, SiblingRejection())
            yield Candidate(offer.name, Paused(offer.drafter), SiblingRejection())
        elif isinstance(offer.drafter, TreeDrafter):
            yield from trees(offer, offer.drafter, conditions)


def trees(offer: Offer, drafter: TreeDrafter, conditions: Conditions) -> Iterator[Candidate]:
    for widths in SHAPES:
        shaped = specdec.trees.Widths(widths).parents
        for rule in suited(shaped, rules(conditions.sampling)):
            made = drafter.with_tree(tree_of(shaped))
            try:
                rule.check(made.spec(conditions.sampling))
            except ValueError:  # deeper than a block
                continue
            yield Candidate(offer.name, made, rule)


def fastest(
    candidates: list[Candidate], held: list[list[torch.Tensor]], conditions: Conditions, say: Callable[[str], None]
) -> list[tuple[Candidate, float]]:
    """The candidates with their speed-ups in one round, the fastest first."""
    found = rounds(Check(candidates, conditions), held, 1, say).speedups()
    speeds = [each.value for each in found]
    return sorted(zip(candidates, speeds, strict=True), key=lambda pair: -pair[1])


def told(found: list[tuple[Candidate, float]]) -> dict[str, float]:
    return {f"{i} {named(each)}": speed for i, (each, speed) in enumerate(found)}


def rounds(check: Check, held: list[list[torch.Tensor]], count: int, say: Callable[[str], None]) -> Check:
    """The check after so many whole rounds."""
    check.run(held, lambda: check.rounds >= count * len(held), say)
    return check


def named(candidate: Candidate) -> str:
    return f"{candidate.name}, {shape(candidate)}, {type(candidate.rule).__name__}"


def held_to(row: dict[str, Any]) -> str:
    """Whether a setting meets what is promised, or cannot be told here."""
    over, speedup = row["over_best"], row["speedup"]
    loss = 1 - over["low"]
    if loss <= LOSS:
        slow = speedup["value"] < 0.97
        return "no: slower than without a draft" if slow else "yes"
    return "cannot tell" if 1 - over["high"] <= LOSS else "no"


def page(rows: list[dict[str, Any]]) -> str:
    """The table, and what it comes to."""
    counts = {said: sum(held_to(row) == said for row in rows) for said in dict.fromkeys(map(held_to, rows))}
    summary = ", ".join(f"{said}: {count}" for said, count in counts.items())
    return (
        "# Plans of `specdec.tune` against exhaustive sweeps, on prompts that they have not seen\n\n"
        f"{markdown([HEADER, *map(_cells, rows)])}\n\nOf {len(rows)} settings, held: {summary}. A setting holds if the "
        f"upper end of the 90 % interval of the loss is at most {LOSS:.0%}; it cannot be told if only the lower end is.\n"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    over, found, told, plan = (row[name] for name in ("over_best", "speedup", "predicted", "plan"))
    chosen = plan["name"] if plan["name"] == "autoregressive" else f"{plan['name']}: {plan['drafter']}, {plan['rule']}"
    error = "-" if told is None else f"{told['value'] / found['value'] - 1:+.0%}"
    said = [
        row["setting"],
        f"{chosen}; {plan['verdict']}",
        row["best"],
        str(Estimate(**over)),
        f"{1 - over['low']:.0%}",
    ]
    return [*said, "-" if told is None else str(Estimate(**told)), str(Estimate(**found)), error, held_to(row)]


if __name__ == "__main__":
    main()
