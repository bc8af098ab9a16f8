"""Write texts for prompts, with drafts or without: with a lossless rule they have the target's law in any case.

Without --plan, the model of --draft or --heads drafts, or what --drafter names: ngram or suffix (from the text itself).
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from specdec.command_line import options
from specdec.drafters import Drafter, NgramDrafter, SuffixDrafter
from specdec.generate import Generation, generate
from specdec.rules import Rule, SiblingRejection
from specdec.tuning import Plan
from specdec.tuning.conditions import chosen
from specdec.tuning.offers import as_drafter

_FROM_TEXT = {"ngram": NgramDrafter, "suffix": SuffixDrafter}


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_shared(parser, new_tokens=128)
    group = parser.add_argument_group("drafting")
    group.add_argument(
        "--plan", metavar="FILE", help="a plan that `tune --save FILE` wrote; give the same --draft and --heads"
    )
    group.add_argument("--drafter", choices=[*_FROM_TEXT, "none"], help="draft from the text, or not at all")
    parser.add_argument("--seed", type=int, default=0, help="decides what is sampled (default: 0)")
    parser.add_argument(
        "--output", metavar="FILE", help="write the texts here, one JSON object a line; else they are shown"
    )


def run(asked: argparse.Namespace) -> None:
    given = options.prompts(asked)
    options.check_writable(asked.output)
    target, tokenizer = options.models(asked)
    drafter, rule = _drafting(asked, target)
    out = generate(
        target, given, drafter, rule=rule, sampling=options.sampling(asked), max_new_tokens=asked.new_tokens,
        tokenizer=tokenizer, seed=asked.seed, batch_size=asked.batch, engine=asked.engine, progress=bool(asked.output),
    )  # fmt: skip
    _write(out, asked.output)
    figures = out.summary()
    print(
        f"{figures['tokens']} tokens, {figures['tokens_per_second']:.0f} a second, {figures['acceptance_length']:.2f} a step"
        f"{'' if drafter is None else f', drafted by {drafter}'}"
    )


def _drafting(asked: argparse.Namespace, target: Any) -> tuple[Drafter | None, Rule]:
    """The drafter and the rule that are asked for."""
    several = len(asked.draft) + bool(asked.heads) + bool(asked.drafter)
    if (not asked.plan and several > 1) or (asked.plan and asked.drafter):
        raise ValueError(
            "--plan, --drafter, --draft and --heads say who drafts: give one of them, or a plan with its models."
        )
    if asked.plan:
        given = options.drafters(asked)
        if len(asked.draft) == 1:  # where tune compared it with others, the plan calls it by its own name
            given[asked.draft[0]] = given["draft"]
        plan, wanted = Plan.load(asked.plan, target, given), chosen(options.sampling(asked))
        if (held := plan.conditions.get("sampling", wanted)) != wanted:
            print(f"The plan was made for other sampling ({held}) than this ({wanted}).", file=sys.stderr)
        return plan.drafter, plan.rule
    if asked.drafter == "none":
        return None, SiblingRejection()
    if asked.drafter:
        return _FROM_TEXT[asked.drafter](), SiblingRejection()
    first = next(iter(options.drafters(asked).items()), None)
    return (None if first is None else as_drafter(*first)), SiblingRejection()


def _write(out: Generation, path: str | None) -> None:
    texts = out.text or []
    if path is None:
        print("\n\n".join(texts), end="\n\n")
        return
    with open(path, "w", encoding="utf-8") as file:
        rows = ({"text": text, "tokens": tokens.tolist()} for text, tokens in zip(texts, out.tokens, strict=True))
        file.writelines(json.dumps(row) + "\n" for row in rows)
