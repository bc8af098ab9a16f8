"""Certificates of the batched code that runs, in its own arithmetic: on laws that floating point is bad at.

    python experiments/certify_fast.py --jobs 2

Every rule, law, dtype and kind of draft weights: the law that `decide_batch` emits at a node, found by bisection of its
decisions (`specdec.testing.fast_paths`), against the exact law of the logits. Then Triton's kernel, in its
interpreter, on coins at the places where those decisions change. Writes `certificates_fast.json` (a row per case),
`certificates_fast_provenance.json` and `certificates_fast.md` to `experiments/results/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # its cases

from certificates.fast_cases import FastCase
from experiments.bench.report import markdown
from experiments.bench.results import ROOT, provenance
from experiments.certify import arguments, certify, write
from specdec import Law, Sampling
from specdec.rules import BlockVerification, KSeq, LevelVerification, Rule, SiblingRejection, TraversalVerification
from specdec.testing.hard_laws import DTYPES, SAMPLINGS, SHAPES, WEIGHTS

RULES: list[Rule] = [
    SiblingRejection(), BlockVerification(), TraversalVerification(), LevelVerification(), KSeq()
]  # fmt: skip


@cache
def cases() -> list[FastCase]:
    """Every case, but for combinations that take minutes and decide as others do."""
    usual, *others = WEIGHTS
    grid = [
        (*shape, sampling, dtype, usual)
        for shape, sampling, dtype in product(SHAPES, SAMPLINGS, DTYPES)
        if _worth(*shape, sampling)
    ]
    grid += [
        (*shape, sampling, dtype, weights)
        for shape, sampling, dtype, weights in product(SHAPES, SAMPLINGS[:2], DTYPES, others)
        if shape[0] < 50 and shape[1] != Law.POINT and shape[2] < 5
    ]
    return [FastCase(rule, *case) for rule, case in product(RULES, grid)]


def _worth(vocab: int, law: Law, width: int, sampling: Sampling) -> bool:
    if sampling.top_p is not None:  # a histogram of 32,768 places for every decision
        return vocab == 3 and width <= 2
    if width == 5:
        return sampling == SAMPLINGS[0]
    return vocab < 50 or sampling == SAMPLINGS[1]


def row(index: int) -> dict[str, Any]:
    """The row of one of `cases()`."""
    torch.set_num_threads(1)
    return cases()[index].row()


def failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that contradict what is claimed: a law too far off, a NaN, a tree that should be accepted and is refused."""

    def fails(row: dict[str, Any]) -> bool:
        if row["refused"] is not None:
            return row["due"]
        return not row["due"] or row["nan"] or not row["total_variation"] <= row["bound"]

    return [row for row in rows if fails(row)]


def kernel(sets: int) -> dict[str, int]:
    """How many sets of coins the kernel decided, and how many otherwise than torch: in a process with the interpreter on."""
    command = [sys.executable, "kernels/tests/kernel_decisions.py", str(sets)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def matrix(rows: list[dict[str, Any]]) -> str:
    """Law, width and dtype by rule: the largest total variation found as a share of its bound, and over how many cases."""
    cells: dict[tuple[str, str, str], dict[str, list]] = {}
    for row in rows:
        key = (row["law"], str(row["width"]), row["dtype"])
        found = cells.setdefault(key, {}).setdefault(row["rule"], [])
        found.append(None if row["refused"] else (row["total_variation"], row["bound"]))
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    body = [[*key, *(_cell(found.get(rule, [])) for rule in rules)] for key, found in cells.items()]
    return markdown([["law", "children", "logits", *rules], *body])


def _cell(found: list) -> str:
    known = [pair for pair in found if pair is not None]
    if not known:
        return "refused" if found else "-"
    return f"{max(distance for distance, _ in known):.1e}, {max(d / b for d, b in known):.0%} ({len(known)})"


def document(rows: list[dict[str, Any]], decided: dict[str, int], made: dict[str, Any]) -> str:
    """The certificate as markdown."""
    commit = made["commit"] + (" with uncommitted changes" if made["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return HEAD.format(
        command=made["command"], commit=commit, versions=versions, rows=len(rows), failed=len(failures(rows)),
        matrix=matrix(rows), **decided,
    )  # fmt: skip


HEAD = """# Certificates of the batched code

`{command}`, commit {commit}; {versions}. {rows} cases, {failed} against what is claimed.

What runs is tensor code in float32 or float64, not the specification that [certificates.md](certificates.md) is about. Here
the law that this code emits after a root with one to five children is found from its decisions alone, by bisection of
its coins for every draft that can be drawn, and compared with the exact law of the logits as they are given in their dtype.
Each case is 29 pairs of laws that are hard for floating point: gaps of 20 to 200 between logits, ties, supports that run out,
masses down to the least number there is, laws that agree or exclude each other, logits around 1000. Given is the largest total
variation, the largest share of its bound, and in brackets over how many cases; the bound is four roundings for each token of
the vocabulary, 4 V 2^-24 (2^-53 for float64), and what bisection leaves unknown. No operation gave NaN.

{matrix}

Triton's kernel of sibling rejection, in Triton's interpreter: {sets:,} sets of coins at the places where torch's decisions
change, one unit in the last place beside them, and as far beside them as the bound allows; {otherwise} decided otherwise.
Where torch is certain, within that distance of 1 or 0, coins stand so far from it. Weights in bfloat16 below its least normal
number are left out there: the interpreter does not convert them rightly.
Nothing here has run on a GPU.
"""


def main() -> None:
    options = arguments(__doc__)
    made = provenance("experiments/certify_fast.py", ["--jobs", str(options.jobs)], {}, "cpu")
    rows, decided = certify(list(range(len(cases()))), options.jobs, row), kernel(2000)
    write(options.output, "certificates_fast", rows, {**made, "kernel": decided}, document(rows, decided, made))
    print(matrix(rows), decided, sep="\n\n")
    if failed := failures(rows):
        raise SystemExit(f"{len(failed)} cases fail:\n{json.dumps(failed, indent=1)}")
    if decided["otherwise"]:
        raise SystemExit(f"The kernel decides {decided['otherwise']} of {decided['sets']} sets of coins otherwise.")


if __name__ == "__main__":
    main()
