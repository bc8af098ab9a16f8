"""Certificates: every drafter, tree, law, rule and sampling, followed through every coin and compared with the target's law.

    python experiments/certify.py --jobs 2

Writes `certificates.json` (one row per case), `certificates_provenance.json` and `certificates.md` to
`experiments/results/`. Lossless rules must read exactly 0, in rational arithmetic; for rules that are not lossless, and
for planted bugs, the total variation found is the figure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import RepetitionPenaltyLogitsProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # its cases and planted bugs

from certificates.cases import ROUNDING, Case, llama, paused
from certificates.mutants import MUTANTS, STOP
from experiments.bench.report import markdown
from experiments.bench.results import ROOT, Json, provenance
from specdec import Law, Sampling
from specdec.drafters import ModelDrafter, NgramDrafter, NoDrafter
from specdec.laws import SAMPLED
from specdec.rules import (
    BlockVerification,
    KSeq,
    LenientRejection,
    LevelVerification,
    Rule,
    SiblingRejection,
    TraversalVerification,
    TypicalAcceptance,
)
from specdec.testing import Table, TabularDrafter, TabularTarget
from specdec.trees import Chain, Dynamic, Widths

RULES: list[Rule] = [
    SiblingRejection(), BlockVerification(), TraversalVerification(), LevelVerification(rounds=1), KSeq(), LenientRejection(),
    TypicalAcceptance(),
]  # fmt: skip
TREES = [
    Chain(1), Chain(2), Chain(3), *(Widths(widths, law) for widths in ((2, 1), (1, 2)) for law in SAMPLED), Dynamic(5, 2, 2)
]  # fmt: skip
SAMPLINGS = [
    Sampling(), Sampling(0.7), Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.8), Sampling(1.0, min_p=0.3),
    Sampling(1.0, processors=(RepetitionPenaltyLogitsProcessor(1.5),)),
]  # fmt: skip


@cache
def cases() -> list[tuple[Case, str | None]]:
    """(case, mutant): every case of the certificate, and None or the number of the bug planted in it."""
    drafters = [*(TabularDrafter(Table(3, seed=1), tree) for tree in TREES), NgramDrafter(2), NoDrafter()]
    stops = ((), (STOP,))
    grid = [
        Case(drafter, rule, sampling, stop_tokens=stop)
        for drafter, rule, sampling, stop in product(drafters, RULES, SAMPLINGS, stops)
    ]
    grid += [  # the draft cut by the budget, and steps after steps
        Case(drafter, rule, stop_tokens=stop, horizon=horizon)
        for drafter, rule, stop, horizon in product(drafters, RULES, stops, (1, 2, 4))
    ]
    grid += [  # siblings at two depths; two tokens, for paths grow fast
        Case(TabularDrafter(Table(2, seed=3), Widths((2, 2), law)), rule, target=TabularTarget(2, 2), stop_tokens=stop)
        for law, rule, stop in product(SAMPLED, RULES, ((), (1,)))
    ]
    grid += [  # whether a step drafts depends on the outcomes of those before it: whole runs
        Case(
            paused(TabularDrafter(Table(2, seed=3), Widths((2, 1), Law.IID))),
            rule,
            target=TabularTarget(2, 2),
            stop_tokens=stop,
            merge=merge,
            horizon=4,
        )
        for rule, stop, merge in product(RULES, ((), (1,)), (True, False))
    ]
    return [*((case, None) for case in [*grid, *models()]), *((mutant.case, mutant.name) for mutant in MUTANTS)]


def models() -> list[Case]:
    """A pair of float64 Llamas, with the cache that real models use."""
    target, draft = llama(0, 2), llama(1, 1)
    trees = [Chain(2), *(Widths((2, 1), law) for law in SAMPLED), Dynamic(5, 2, 2)]
    return [
        Case(ModelDrafter(draft, tree), rule, target=target, stop_tokens=(3,)) for tree, rule in product(trees, RULES)
    ]


def row(index: int) -> dict[str, Any]:
    """The row of one of `cases()`, with the bug planted where there is one."""
    torch.set_num_threads(1)
    case, name = cases()[index]
    mutant = next((mutant for mutant in MUTANTS if mutant.name == name), None)
    if mutant is None:
        return case.row()
    with mutant.planted():
        return case.row(name)


def certify(indices: list[int], jobs: int = 1, row: Callable[[int], dict[str, Any]] = row) -> list[dict[str, Any]]:
    """The rows of some cases, in their order; `row` is a function of a module, as processes look it up by its name."""
    bar: dict[str, Any] = {"total": len(indices), "desc": "certifying", "leave": False}
    if jobs == 1:
        return list(tqdm(map(row, indices), **bar))
    # spawned: a process forked from one that has run torch may hang on its threads
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return list(tqdm(pool.map(row, indices, chunksize=8), **bar))


def failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that contradict what the package claims: a lossless rule that is biased, a planted bug that is not."""

    def fails(row: dict[str, Any]) -> bool:
        if row["mutant"] is not None:
            return not row["total_variation"]
        return row["lossless"] and row["total_variation"] > (ROUNDING if row["drafter"] == "model" else 0)

    return [row for row in rows if row["refused"] is None and fails(row)]


def matrix(rows: list[dict[str, Any]]) -> str:
    """Drafters and trees by rule: the largest total variation found, and over how many cases."""
    rows = [row for row in rows if row["mutant"] is None]
    cells: dict[tuple[str, str, str], dict[str, list]] = {}
    for row in rows:
        found = cells.setdefault((row["drafter"], row["tree"], row["law"]), {}).setdefault(row["rule"], [])
        found.append(None if row["refused"] else row["total_variation"])
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    body = [[*draft, *(_cell(found.get(rule, [])) for rule in rules)] for draft, found in cells.items()]
    return markdown([["drafter", "tree", "law", *rules], *body])


def mutants(rows: list[dict[str, Any]]) -> str:
    """Planted bugs, and how far each moves the law."""
    found = [row for row in rows if row["mutant"] is not None]
    keys = ("mutant", "tree", "law", "sampling", "horizon")
    return markdown(
        [[*keys, "total variation"], *([*(str(r[k]) for k in keys), _number(r["total_variation"])] for r in found)]
    )


def document(rows: list[dict[str, Any]], made: dict[str, Any]) -> str:
    """The certificate as markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    refusals = dict.fromkeys((row["rule"], row["refused"]) for row in rows if row["refused"])
    samplings = ", ".join(dict.fromkeys(row["sampling"] for row in rows))
    commit = made["commit"] + (" with uncommitted changes" if made["dirty"] else "")
    return HEAD.format(
        command=made["command"], commit=commit, versions=versions, rows=len(rows), samplings=samplings,
        matrix=matrix(rows), mutants=mutants(rows), rounding=ROUNDING, failed=len(failures(rows)),
        followed=f"{sum(row['paths'] or 0 for row in rows):,}",
        refusals="\n".join(f"- {reason}" for _, reason in sorted(refusals)),
    )  # fmt: skip


def _cell(found: list) -> str:
    known = [distance for distance in found if distance is not None]
    if not known:
        return "refused" if found else "-"
    return f"{_number(max(known))} ({len(known)})"


def _number(distance: float) -> str:
    return "0" if distance == 0 else f"{distance:.2g}"


HEAD = """# Certificates

`{command}`, commit {commit}; {versions}. {rows} cases, {followed} outcomes followed; {failed} cases
against what is claimed.

Every coin of the real loop is followed both ways and the law of the generated text compared with the target's own. Given
is the largest total variation over all samplings, stop tokens and horizons, and in brackets over how many of them;
0 is exact, in rational arithmetic. `model` is a pair of float64 Llamas with the real cache, where rounding leaves up to
{rounding}. `LenientRejection` and `TypicalAcceptance` do not claim to be lossless, except that greedy texts are the target's.
Every row is in `certificates.json`. Samplings: {samplings}.

{matrix}

Refused, with the reason the rule gives:

{refusals}

## Planted bugs

Each must be found.

{mutants}
"""


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of a certificate."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=ROOT / "experiments" / "results", help="folder")
    return parser.parse_args()


def write(folder: Path, name: str, rows: list[dict[str, Any]], made: dict[str, Any], text: str) -> None:
    """The three files of a certificate: its rows, what produced them, and its document."""
    lines = ",\n".join(map(json.dumps, rows))  # a row per line, for differences to be read
    (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    Json(str(folder / f"{name}_provenance.json")).write(made)
    (folder / f"{name}.md").write_text(text, "utf-8")


def main() -> None:
    options = arguments(__doc__)
    made = provenance("experiments/certify.py", ["--jobs", str(options.jobs)], {}, "cpu")
    rows = certify(list(range(len(cases()))), options.jobs)
    write(options.output, "certificates", rows, made, document(rows, made))
    print(matrix(rows), mutants(rows), sep="\n\n")
    if failed := failures(rows):
        raise SystemExit(f"{len(failed)} cases fail:\n{json.dumps(failed, indent=1)}")


if __name__ == "__main__":
    main()
