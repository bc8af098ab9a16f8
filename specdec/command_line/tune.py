"""Find out which drafter, tree and acceptance rule are fastest.

The target writes texts for the prompts, steps are timed, the speed-up of every candidate is foretold from both, and the best
three are decoded. The table says how sure each number is, and the text below it why nothing pays if that is so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specdec.command_line import options
from specdec.tuning import tune
from specdec.tuning.offers import OWN


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_shared(parser, new_tokens=64)
    group = parser.add_argument_group("search")
    group.add_argument(
        "--seconds", type=float, default=60, help="how long it may take; Ctrl-C ends it earlier (default: 60)"
    )
    group.add_argument(
        "--own",
        nargs="*",
        default=list(OWN),
        choices=OWN,
        metavar="NAME",
        help=f"what is compared of the target's own: {', '.join(OWN)} (default: all)",
    )
    group.add_argument("--save", metavar="FILE", help="write the plan here as YAML, for `generate --plan FILE`")
    group.add_argument("--picture", metavar="FILE", help="draw the speed-ups here (.svg, .png, .pdf), with matplotlib")


def run(asked: argparse.Namespace) -> None:
    given = options.prompts(asked)
    target, tokenizer = options.models(asked)
    plan = tune(
        target, given, options.drafters(asked), own=asked.own, sampling=options.sampling(asked), tokenizer=tokenizer,
        max_new_tokens=asked.new_tokens, batch_size=asked.batch, engine=asked.engine, seconds=asked.seconds,
    )  # fmt: skip
    print(f"\n{plan.table()}\n\n{plan}")
    if asked.save:
        Path(asked.save).parent.mkdir(parents=True, exist_ok=True)
        plan.save(asked.save)
        print(asked.save)
    if asked.picture:
        plan.picture().figure.savefig(asked.picture)
        print(asked.picture)
