"""Speculative decoding of models from transformers, from the command line.

  python -m specdec tune     finds out which drafter, tree and rule are fastest for a model, prompts and this machine
  python -m specdec generate writes texts, with a plan of `tune` or a drafter that is named

Try it with the small models that come along:

  python -m specdec tune --target demo --draft demo --prompt "def fib(n):" --prompt "import os" --save plan.yaml
  python -m specdec generate --target demo --draft demo --plan plan.yaml --prompt "def fib(n):"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from specdec.command_line import generate, tune


def main(words: Sequence[str] | None = None) -> None:
    """Run a command; mistakes end in a message."""
    parser = argparse.ArgumentParser(
        prog="python -m specdec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in (("tune", tune), ("generate", generate)):
        own = commands.add_parser(
            name,
            help=str(command.__doc__).splitlines()[0],
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(own)
        own.set_defaults(run=command.run)
    asked = parser.parse_args(words)
    try:
        asked.run(asked)
    except (ValueError, OSError) as error:
        sys.exit(f"specdec: {error}")
    except KeyboardInterrupt:
        sys.exit("specdec: interrupted.")


if __name__ == "__main__":
    main()
