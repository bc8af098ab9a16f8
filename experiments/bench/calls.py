"""How a script begins: a mistake in its command ends in one message, before anything that takes seconds is imported.

A misspelt key is told with its constructor and the argument that was meant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from experiments.bench.signatures import arguments

try:
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"{missing.name} is not installed, which experiments need beside specdec: `make install` in the checkout sets up all, "
        "`pip install -e '.[experiments]'` adds it to an environment of your own."
    ) from None

CONF = Path(__file__).resolve().parents[2] / "conf"


def script(name: str, config_name: str) -> NoReturn:
    """Run the script experiments/`name`.py: its `main`, with a configuration of conf/`config_name`.yaml that is checked.

    Only then the script is imported, by this name, and with it torch and the models, which takes seconds.
    """

    def main(config: DictConfig) -> Any:
        check(OmegaConf.to_container(config))
        return import_module(f"experiments.{name}").main(config)

    main.__module__ = f"experiments.{name}"  # by which hydra names the job
    run(hydra.main(str(CONF), config_name, version_base="1.3")(main))
    sys.exit()


def leads() -> bool:
    """Whether this process speaks for the run: of those that torchrun started, which all compute the same, the first."""
    return os.environ.get("RANK", "0") == "0"


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
    distributed = sys.modules.get("torch.distributed")  # None where a mistake was told before torch was imported
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()  # nobody leaves while another is still being answered
        distributed.destroy_process_group()


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
        owner, known = node["_target_"], arguments(node["_target_"])
    else:
        owner, known = "the configuration", list(node)
    if known is None or key in known:
        return None
    close = get_close_matches(key, known, n=1)
    cure = f"did you mean {close[0]!r}?" if close else "remove it."
    return f"{path}: {owner} has no argument {key!r}; {cure} It takes: {', '.join(known) or 'nothing'}."
