"""How often the audit raises a false alarm, and how large a bias it finds in how many tokens.

    python experiments/studies/audit_calibration.py

Generators are the real loop on tables, over hundreds of seeds, and on the demo pair. Bugs are planted in the rule with an
adjustable strength; the bias of each is the total variation of what one step emits, averaged over the steps of the run.
Writes `experiments/results/audit_calibration.md`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # its planted bugs

import specdec
from certificates.mutants import Sequential
from experiments.bench.report import markdown
from experiments.bench.results import ROOT, provenance
from specdec import DraftTree, Sampling
from specdec.batch import Batch
from specdec.drafters import Drafter, DraftRun, ModelDrafter, TreeDrafter, TreeDraftRun
from specdec.models.target import Scores, TargetRun
from specdec.rules import Rule, SiblingRejection
from specdec.rules.residual import residual
from specdec.testing import Table, TabularTarget
from specdec.testing.audit import SHAPES, STAKES, Audit, audit, detectable, model_log_probs
from specdec.trees import Chain, Frontier, TreePolicy

SAMPLING = Sampling(1.0)
BETS = 3 * len(SHAPES) * len(STAKES)  # with the three orders


class Planted(Sequential):
    """Sibling rejection on chains of one, biased by a known amount; `bias` is what it came to."""

    lossless = False

    def __init__(self, strength: float):
        self.strength, self.steps, self.total = strength, 0, 0.0

    @property
    def bias(self) -> float:
        """Total variation of what a step emits, averaged over the steps so far."""
        return self.total / max(self.steps, 1)

    def decide(self, tree, target_law, coins):
        self.steps += 1
        return super().decide(tree, target_law, coins)


class PartOfTheResidual(Planted):
    """After a rejection, part of what is emitted comes from the target's law instead of the residual."""

    def owed(self, p, q, tree, node):
        right = residual(1, p, q)[1]
        wrong = self.strength * p + (1 - self.strength) * right
        self.total += _distance(wrong, right)
        return wrong


class EmittedTooCold(Planted):
    """Emitted tokens are sampled at temperature 1 - strength, drafts are tested at temperature 1."""

    def emit(self, coins, path, p, target_law):
        wrong = coins.normalise(p ** (1 / (1 - self.strength)))
        self.total += _distance(wrong, p)
        return coins.pick(path[-1], wrong)


class AcceptsTooMuch(Planted):
    """A draft is accepted with probability p / q + strength."""

    def decide(self, tree, target_law, coins):
        p = target_law.probs(0)
        for _, q in tree.draws(0, len(p)):
            taken = np.minimum(q, p + self.strength * q)
            self.total += _distance(taken + (1 - taken.sum()) * residual(1, p, q)[1], p)
        return super().decide(tree, target_law, coins)

    def test(self, coins, child, p, q):
        return coins.accept(child, p / q + self.strength)


def on_tables(rule: Rule, seed: int, **options: Any) -> Audit:
    """The audit of texts over 8 tokens, where laws depend on the last token."""
    target, drafter = MarkovTarget(8, seed=0), MarkovDrafter(Markov(8, seed=1), Chain(1))
    prompts = [torch.tensor([b % 8]) for b in range(64)]
    generate = generator(target, prompts, drafter, rule, 32)
    draft = options.pop("with_draft", True)
    return audit(
        generate,
        target.log_probs,
        draft_log_probs=drafter.table.log_probs if draft else None,
        seed=seed << 20,
        **options,
    )


def on_demo(rule: Rule, seed: int = 0, batch: int = 64, with_draft: bool = True, **options: Any) -> Audit:
    """The audit of the demo pair at temperature 1."""
    pair = _pair()
    prompts = [pair.tokenizer(p.text, return_tensors="pt").input_ids[0, :24] for p in pair.prompts[:batch]]
    generate = generator(pair.target, prompts, ModelDrafter(pair.draft, Chain(1)), rule, 32)
    draft = model_log_probs(pair.draft, SAMPLING) if with_draft else None
    return audit(generate, model_log_probs(pair.target, SAMPLING), draft_log_probs=draft, seed=seed << 20, **options)


@cache
def _pair() -> specdec.demo.Demo:
    return specdec.demo.load()


def generator(
    target: Any, prompts: list[Tensor], drafter: Drafter, rule: Rule, max_new_tokens: int
) -> Callable[[int], Iterable[tuple[Tensor, Tensor]]]:
    """`specdec.generate` as the audit calls it."""

    def generate(seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        out = specdec.generate(
            target,
            prompts,
            drafter,
            rule=rule,
            sampling=SAMPLING,
            max_new_tokens=max_new_tokens,
            stop_tokens=(),
            seed=seed,
        )
        return zip(prompts, out.tokens, strict=True)

    return generate


class Markov:
    """Laws that depend on the last token only: one look-up for a batch."""

    def __init__(self, vocab: int, seed: int):
        self.vocab = vocab
        self.rows = torch.stack([Table(vocab, seed).logits((token,)) for token in range(vocab)])  # [last token, vocab]

    def log_probs(self, prompt: Tensor, continuation: Tensor) -> Tensor:
        """[len(continuation), vocab], as the audit asks for them."""
        return self.rows[torch.cat([prompt[-1:], continuation[:-1]])].log_softmax(-1)


class MarkovTarget(Markov, TabularTarget):
    def start(self, batch: Batch, states: Sequence[int] = (), last: TargetRun | None = None) -> TargetRun:
        return _MarkovRun(self, batch)


class _MarkovRun(TargetRun):
    target: MarkovTarget

    def score(self, tree: DraftTree) -> Scores:
        return Scores(self.target.rows[tree.tokens])


class MarkovDrafter(TreeDrafter):
    def __init__(self, table: Markov, tree: TreePolicy):
        super().__init__(tree)
        self.table = table

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        return _MarkovDraftRun(self, batch, last)


class _MarkovDraftRun(TreeDraftRun):
    drafter: MarkovDrafter

    def score(self, frontier: Frontier) -> Tensor:
        return self.drafter.table.rows[frontier.tokens]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).sum() / 2)


ALPHAS = (0.2, 0.05, 0.01)
TABLE_BUGS = (
    (PartOfTheResidual, 0.4),
    (PartOfTheResidual, 0.8),
    (EmittedTooCold, 0.2),
    (AcceptsTooMuch, 0.1),
)
DEMO_BUGS = {  # at least 0.05, and at least 0.02, per step
    0.05: ((PartOfTheResidual, 0.6), (EmittedTooCold, 0.1), (AcceptsTooMuch, 0.12)),
    0.02: ((PartOfTheResidual, 0.22), (EmittedTooCold, 0.03), (AcceptsTooMuch, 0.04)),
}
DEMO_TOKENS = {0.05: 12_000, 0.02: 60_000}


def false_alarms(seeds: int, tokens: int) -> list[list[str]]:
    """Rows of (alpha, runs, alarms) for the exact rule; one run's evidence serves every alpha."""
    evidence = [on_tables(SiblingRejection(), seed, alpha=1e-9, max_tokens=tokens).evidence for seed in _bar(seeds)]
    rows = []
    for alpha in ALPHAS:
        alarms = sum(found >= math.log(1 / alpha) for found in evidence)
        rows.append([f"{alpha}", f"{seeds}", f"{tokens}", f"{alarms}", f"{alarms / seeds:.3f}"])
    return [["alpha", "runs", "tokens each", "alarms", "rate"], *rows]


def halves(seeds: int, counts: tuple[int, ...], alpha: float = 0.01) -> list[list[str]]:
    """How often the bias that `detectable` states is found: one half of the token order favoured by just that much."""
    rows = [["tokens", "detectable: bias per token", "found"]]
    for tokens in counts:
        bias = detectable(tokens, alpha, BETS)
        found = sum(not _half(tokens, bias, seed, alpha).passed for seed in _bar(seeds))
        rows.append([f"{tokens}", f"{bias:.3f}", f"{found / seeds:.2f}"])
    return rows


def _half(tokens: int, bias: float, seed: int, alpha: float) -> Audit:
    """Four equally likely tokens, of which the first two get `bias` more."""
    law = torch.tensor([1 + 2 * bias, 1 + 2 * bias, 1 - 2 * bias, 1 - 2 * bias])
    uniform = torch.full((tokens, 4), 0.25).log()

    def generate(seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        drawn = torch.multinomial(law, tokens, replacement=True, generator=torch.Generator().manual_seed(seed))
        return [(torch.tensor([0]), drawn)]

    def log_probs(prompt: Tensor, continuation: Tensor) -> Tensor:
        return uniform[: len(continuation)]

    return audit(generate, log_probs, draft_log_probs=log_probs, max_tokens=tokens, alpha=alpha, seed=seed)


def power_on_tables(seeds: int, tokens: int) -> list[list[str]]:
    """How often bugs are found on tables, with and without the draft's law, and after how many tokens."""
    rows = [
        ["bug", "strength", "bias per step", "found", "tokens, median", "found without the draft", "tokens, median"]
    ]
    for bug, strength in TABLE_BUGS:
        rule, cells = bug(strength), []
        for with_draft in (True, False):
            runs = [on_tables(rule, seed, max_tokens=tokens, with_draft=with_draft) for seed in _bar(seeds)]
            cells += [
                f"{sum(not run.passed for run in runs) / seeds:.2f}",
                f"{np.median([r.tokens for r in runs]):.0f}",
            ]
        rows.append([bug.__name__, f"{strength}", f"{rule.bias:.3f}", *cells])
    return rows


def power_on_demo() -> list[list[str]]:
    """One run of each bug on the demo pair, and of the exact rule."""
    rows = [["rule", "strength", "bias per step", "most tokens", "verdict", "tokens", "evidence", "detectable"]]
    runs = [(least, bug(strength)) for least, bugs in DEMO_BUGS.items() for bug, strength in bugs]
    for least, rule in tqdm([(0.05, SiblingRejection()), *runs], desc="demo pair", leave=False):
        run = on_demo(rule, max_tokens=DEMO_TOKENS[least])
        known = [f"{rule.strength}", f"{rule.bias:.3f}"] if isinstance(rule, Planted) else ["-", "0"]
        verdict = "passed" if run.passed else f"failed: {run.leading}"
        figures = [f"{DEMO_TOKENS[least]}", verdict, f"{run.tokens}", f"{run.evidence:.1f}", f"{run.detectable:.3f}"]
        rows.append([type(rule).__name__, *known, *figures])
        print(*rows[-1], flush=True)
    return rows


def _bar(seeds: int) -> Iterable[int]:
    return tqdm(range(seeds), leave=False)


HEAD = """# Calibration of the audit

`{command}`, commit {commit}; {versions}; {seconds:.0f} s on one thread.

Orders: probability, token id, draft; alpha 0.01 where nothing else is said. Biases are total variations.

## False alarms

Sibling rejection on tables, texts of 32 tokens. Alarms at whatever token they come must not be more than alpha of the runs.

{alarms}

## The bias that is stated as detectable

One half of an order favoured by just that bias, {half_seeds} runs each; it should be found in 0.9 of them.

{halves}

## Planted bugs on tables

8 tokens, laws that depend on the last token, chains of one; {seeds} runs of at most {tokens} tokens. A step emits one or two
tokens, and a bug biases one of them, in directions that no single order follows: the bias per step is up to twice
that per token.

{tables}

## Planted bugs on the demo pair

Temperature 1, chains of one, batch 64, 32 new tokens after prompts of 24; one run each.

{demo}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="runs per figure on tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, seeds, tokens = time.perf_counter(), options.seeds, 4000
    made = provenance("experiments/studies/audit_calibration.py", [f"--seeds={seeds}"], {}, "cpu")
    parts: dict[str, Callable[[], list[list[str]]]] = {
        "alarms": lambda: false_alarms(2 * seeds, 1500),
        "halves": lambda: halves(seeds, (1000, 4000, 16000)),
        "tables": lambda: power_on_tables(seeds // 10, tokens),
        "demo": power_on_demo,
    }
    tables = {}
    for name, part in parts.items():
        tables[name] = markdown(part())
        print(tables[name], end="\n\n", flush=True)
    text = HEAD.format(
        command=made["command"], commit=made["commit"] + (" with uncommitted changes" if made["dirty"] else ""),
        versions=", ".join(f"{name} {version}" for name, version in made["versions"].items()),
        seconds=time.perf_counter() - began, seeds=seeds // 10, half_seeds=seeds, tokens=tokens,
        **tables,
    )  # fmt: skip
    (ROOT / "experiments" / "results" / "audit_calibration.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
