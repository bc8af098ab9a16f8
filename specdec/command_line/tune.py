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
    options.check_writable(asked.save, asked.picture)
    _check_picture(asked.picture)
    target, tokenizer = options.models(asked)
    plan = tune(
        target, given, options.drafters(asked), own=asked.own, sampling=options.sampling(asked), tokenizer=tokenizer,
        max_new_tokens=asked.new_tokens, batch_size=asked.batch, engine=asked.engine, seconds=asked.seconds,
    )  # fmt: skip
    print(f"\n{plan.table()}\n\n{plan}")
    if asked.save:
        plan.save(asked.save)
        print(asked.save)
    if asked.picture and plan.rows:
        plan.picture().figure.savefig(asked.picture)
        print(asked.picture)


def _check_picture(path: str | None) -> None:
    """ValueError if matplotlib cannot draw such a file: better before a search than after it."""
    if path is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--picture is drawn by matplotlib: pip install 'specdec[pictures]'.") from error
    kinds = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".") not in kinds:
        raise ValueError(f"--picture {path}: there is no such kind of picture; give one of {', '.join(sorted(kinds))}.")
