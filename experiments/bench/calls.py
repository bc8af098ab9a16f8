"""A misspelt key in a configuration ends in one message that names the constructor and the argument that was meant."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from difflib import get_close_matches
from typing import Any

import torch
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf.errors import OmegaConfBaseException

from experiments.bench.results import leads


def check(node: Any, path: str = "") -> None:
    """Exit with that message unless every constructor call in `node`, a plain container, names arguments that exist."""
    if isinstance(node, dict) and "_target_" in node:
        for key in node:
            if not key.startswith("_") and (message := _unknown(node, key, path + key)):
                raise SystemExit(message)
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        check(child, f"{path}{key}.")


def run(main: Callable[[], Any]) -> None:
    """Run a `@hydra.main` function; a mistake in its configuration or overrides ends in a message, not a traceback.

    Under torchrun the processes that do not lead say nothing, but for errors.
    """
    if not leads():
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            _run(main)
    else:
        _run(main)
    close_processes()


def close_processes() -> None:
    """End the group of processes that transformers opens for a model that is cut over several (`tp_plan`), if there is one.

    Threads of a group that is still open when Python ends may abort the process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another is still being answered
        torch.distributed.destroy_process_group()


def _run(main: Callable[[], Any]) -> None:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return main()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise hydra prints errors itself, and it knows no constructors
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; the same command goes on from what it has written.") from None
    except (HydraException, OmegaConfBaseException) as error:
        cause: Any = error.__cause__
        node, key = getattr(cause, "parent_node", None), getattr(cause, "key", None)
        unknown = _unknown(node, str(key), cause.full_key) if node is not None else None
        raise SystemExit(unknown or "\n".join(str(e) for e in (error, cause) if e)) from None


def _unknown(node: Any, key: str, path: str) -> str | None:
    """What is wrong with this key, and the cure; None if it is fine."""
    if "_target_" in node:
        owner, known = node["_target_"], _arguments(node["_target_"])
    else:
        owner, known = "the configuration", list(node)
    if known is None or key in known:
        return None
    close = get_close_matches(key, known, n=1)
    cure = f"did you mean {close[0]!r}?" if close else "remove it."
    return f"{path}: {owner} has no argument {key!r}; {cure} It takes: {', '.join(known) or 'nothing'}."


def _arguments(target: str) -> Iterable[str] | None:
    """The arguments of a constructor; None if it takes any. `**unknown: Never` takes none: it is there to tell the cure."""
    parameters = inspect.signature(get_object(target)).parameters
    known = {name: p for name, p in parameters.items() if p.annotation != "Never"}
    return None if any(p.kind is p.VAR_KEYWORD for p in known.values()) else list(known)
