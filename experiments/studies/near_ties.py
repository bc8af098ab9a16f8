"""Where a text in bfloat16 parts from that of `model.generate`: is it at a near tie?

    python -m experiments.studies.near_ties FOLDER --per-task 10

Passes over several nodes and over one round differently, and so does a cache that was filled otherwise. So texts part where two
tokens are about as probable. For every text that parts, this says by how much: the difference of the two tokens' logits, by the
model in float32 and in bfloat16, beside what bfloat16 can tell apart at that size.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import specdec
from experiments.bench.inputs import ids_of
from experiments.bench.real_prompts import real
from experiments.bench.report import markdown
from experiments.bench.results import Json, provenance
from specdec.demo import smollm2
from specdec.drafters import SuffixDrafter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with spec_bench.jsonl, humaneval.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--per-task", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--path", default="outputs/near_ties.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    exact, rounded = (smollm2.load(dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    prompts = real(options.folder, per_task=options.per_task)
    found = []
    for prompt in tqdm(prompts, desc="texts"):
        ids = ids_of(rounded.tokenizer, [prompt.turns[0]], chat=True)
        model: Any = rounded.target
        theirs = model.generate(
            ids[None], max_new_tokens=options.new_tokens, do_sample=False, attention_mask=torch.ones_like(ids)[None]
        )[0, len(ids) :]
        for name, drafter in (("none", None), ("suffix", SuffixDrafter())):
            ours = specdec.generate(rounded.target, ids, drafter, max_new_tokens=options.new_tokens).tokens[0]
            found.append(
                {"task": prompt.task, "draft": name, **parting(exact.target, rounded.target, ids, theirs, ours)}
            )
    source = provenance("-m", ["experiments.studies.near_ties", *sys.argv[1:]], vars(options), "cpu")
    print(table(found))
    print(Json(options.path).write({**source, "partings": found}))


@torch.inference_mode()
def parting(exact: Any, rounded: Any, prompt: Tensor, theirs: Tensor, ours: Tensor) -> dict[str, Any]:
    """Where two texts part, and the difference of the two tokens' logits there; nothing if they do not."""
    n = min(len(theirs), len(ours))
    differ = (theirs[:n] != ours[:n]).nonzero()
    if not len(differ):
        return {}
    at = int(differ[0])
    text, tokens = torch.cat([prompt, ours[:at]])[None], (int(theirs[at]), int(ours[at]))
    logits = [model(text, logits_to_keep=1).logits[0, -1].float() for model in (exact, rounded)]
    gaps = [abs(float(of[tokens[0]] - of[tokens[1]])) for of in logits]
    top = float(logits[1].max())
    step = 2.0 ** (math.floor(math.log2(abs(top))) - 7)  # of bfloat16, with 8 bits, at the largest logit
    return {"at": at, "tokens": tokens, "gap float32": gaps[0], "gap bfloat16": gaps[1], "step": step}


def table(found: list[dict[str, Any]]) -> str:
    """By draft: how many texts part, and how far apart the two tokens are, in steps of bfloat16."""
    rows = [["draft", "texts", "equal", "steps apart: median", "95 %", "most"]]
    for name in dict.fromkeys(each["draft"] for each in found):
        mine = [each for each in found if each["draft"] == name]
        steps = sorted(each["gap bfloat16"] / each["step"] for each in mine if "at" in each)
        shown = [f"{steps[int(share * (len(steps) - 1))]:.1f}" for share in (0.5, 0.95, 1)] if steps else ["-"] * 3
        rows.append([name, str(len(mine)), str(len(mine) - len(steps)), *shown])
    return markdown(rows)


if __name__ == "__main__":
    main()
