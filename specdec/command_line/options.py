"""Options that commands share, and what is made of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from specdec import demo
from specdec.checks import as_int
from specdec.drafters import MedusaHeads
from specdec.huggingface.names import model, tokenizer
from specdec.prompt_files import read
from specdec.sampling import Sampling

_NAMED = "a name on the hub, a folder, a .gguf file, or demo: the small model that comes along"


def add_shared(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    """All options here; `new_tokens` is a default."""
    _add_models(parser)
    _add_prompts(parser)
    _add_decoding(parser, new_tokens)


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("--target", required=True, metavar="NAME", help=f"the model that writes: {_NAMED}")
    group.add_argument("--tokenizer", metavar="NAME", help="its tokenizer, if that is elsewhere")
    group.add_argument(
        "--draft",
        action="append",
        default=[],
        metavar="NAME",
        help="a small model that drafts, likewise; several are compared by tune",
    )
    group.add_argument("--heads", metavar="FOLDER", help="Medusa heads that were trained for the target")
    group.add_argument(
        "--dtype", default="float32", help="type of the weights: float32, bfloat16, float16 (default: float32)"
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    group.add_argument("--threads", type=int, default=1, help="threads on a CPU (default: 1)")


def _add_decoding(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token (default: 0)")
    group.add_argument("--top-k", type=int, help="sample from so many of the most probable tokens only")
    group.add_argument("--top-p", type=float, help="sample from the most probable tokens of so much probability only")
    group.add_argument(
        "--new-tokens", type=int, default=new_tokens, metavar="N", help=f"most per text (default: {new_tokens})"
    )
    group.add_argument("--batch", type=int, default=1, metavar="N", help="texts at work together (default: 1)")
    group.add_argument(
        "--engine", default="eager", help="eager, graph (CUDA graphs) or compile (torch.compile) (default: eager)"
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help='.jsonl: objects with a "prompt" (text, or token ids) or "messages" (of a chat); any other file: one text a line',
    )
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="one prompt; several are allowed")


def models(asked: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target and the tokenizer."""
    logging.disable_progress_bar()
    torch.set_num_threads(as_int("--threads", asked.threads, 1))
    _check_device(asked.device)
    names = asked.tokenizer or _folder(asked.target, "tokenizer") or asked.target
    return _model(asked, asked.target, "target"), tokenizer(names)


def drafters(asked: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Functions that load draft models and heads, by the names that are given; a draft that is alone is called so."""
    several = [*asked.draft, *(["heads"] if asked.heads else [])]
    if twice := sorted({name for name in several if several.count(name) > 1}):
        raise ValueError(f"two drafters are called {', '.join(twice)}: give each once.")
    alone = len(asked.draft) == 1
    found = {"draft" if alone else name: partial(_model, asked, name, "draft") for name in asked.draft}
    return {**found, "heads": partial(_heads, asked)} if asked.heads else found


def _heads(asked: argparse.Namespace) -> MedusaHeads:
    return MedusaHeads.load(_folder(asked.heads, "heads") or asked.heads).to(asked.device, _dtype(asked))


def prompts(asked: argparse.Namespace) -> list[Any]:
    """The prompts of the file and those that are given; ValueError if there are none."""
    found = [*(read(asked.prompts) if asked.prompts else []), *asked.prompt]
    if not found:
        raise ValueError("there is no prompt: give --prompts FILE or --prompt TEXT.")
    return found


def sampling(asked: argparse.Namespace) -> Sampling:
    return Sampling(asked.temperature, top_k=asked.top_k, top_p=asked.top_p)


def check_writable(*paths: str | None) -> None:
    """Make the folders of files that are to be written; ValueError or OSError if one cannot be."""
    for path in map(Path, filter(None, paths)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path} cannot be written: name a file in a folder that is yours.")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: there is no such device; give cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device {name}: torch finds {count} such devices here; give cpu.")


def _model(asked: argparse.Namespace, name: str, part: str) -> PreTrainedModel:
    return model(_folder(name, part) or name, _dtype(asked)).to(asked.device)  # type: ignore[arg-type] - its stub is wrong


def _folder(name: str, part: str) -> str | None:
    """Where a part of the demo is, if that is asked for."""
    return str(demo.FOLDER / part) if name == "demo" else None


def _dtype(asked: argparse.Namespace) -> torch.dtype:
    found = getattr(torch, asked.dtype, None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"--dtype {asked.dtype}: there is no such type; give float32, bfloat16 or float16.")
    return found
