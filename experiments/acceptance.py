"""Tokens per target forward of every draft law with every rule, on trees of one size and the same prompts: one table.

    python experiments/acceptance.py target=demo task.per_task=16 new_tokens=64 repeats=2

Takes the settings of `experiments/benchmark.py`, of which it does not use `methods` and `rule`, and decodes all prompts in
one batch, as only acceptance is looked at. Intervals are bootstraps over prompts; differences are paired by prompt.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("acceptance", "benchmark")

from itertools import product
from typing import Any

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

import specdec
from experiments.bench.inputs import begin
from experiments.bench.report import interval, markdown, mean, per_prompt
from specdec import Law, rules
from specdec.drafters import ModelDrafter
from specdec.trees import TreePolicy, Widths

WIDTHS = [4, 2, 1]
CHAIN = [1, 1, 1, 1]
RULES = [getattr(rules, name)() for name in rules.__all__ if hasattr(getattr(rules, name), "lossless")]
HEADER = ["tree", "law", "rule", "lossless", "tokens per forward (95 % CI)", "over token-level, same size (95 % CI)"]


def main(config: DictConfig) -> None:
    setting = begin("experiments/acceptance.py", config)
    prompts, sampling, draft = setting.prompts, setting.sampling, setting.draft
    settings = {"sampling": sampling, "max_new_tokens": config.new_tokens}
    found: dict[tuple[str, str, str], np.ndarray] = {}
    for (name, tree), rule in tqdm(list(product(trees().items(), RULES)), desc="decoding", leave=False):
        drafter = ModelDrafter(draft, tree)
        try:
            rule.check(drafter.spec(sampling))
        except ValueError:
            continue
        runs = [
            specdec.generate(setting.models.target, prompts, drafter, rule=rule, seed=seed, **settings)
            for seed in range(config.repeats)
        ]
        found[(*name, type(rule).__name__)] = per_prompt(runs)
    rows = [row(key, lengths, found) for key, lengths in found.items()]
    cells = ([*r[:4], *(interval(pair, digits=3, to=" to ") for pair in r[4:])] for r in rows)
    table = markdown([HEADER, *cells])
    print(f"{len(prompts)} prompts x {config.new_tokens} tokens x {config.repeats} seeds\n\n{table}\n")
    names = ("tree", "law", "rule", "lossless", "tokens_per_forward", "over_token_level")
    figures = [dict(zip(names, r, strict=True)) for r in rows]
    print(setting.log.write({**setting.source, "prompts": len(prompts), "figures": figures}))


def trees() -> dict[tuple[str, str], TreePolicy]:
    """By (shape, law): chains, and trees of one size."""
    made: dict[tuple[str, str], TreePolicy] = {("chain of 4", "IID"): Widths(CHAIN, Law.IID)}
    laws = (Law.POINT, Law.IID, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP)
    return {**made, **{("4-2-1", law.name): Widths(WIDTHS, law) for law in laws}}


def row(key: tuple[str, str, str], lengths: np.ndarray, found: dict[tuple[str, str, str], np.ndarray]) -> list[Any]:
    """One row of the table; token-level rejection is the sibling rule on independent children (chains: on the chain)."""
    shape, _, rule = key
    base = found[shape, "IID", "SiblingRejection"]
    lossless = "yes" if getattr(rules, rule).lossless else "no"
    return [*key, lossless, mean(lengths), mean(lengths - base)]
