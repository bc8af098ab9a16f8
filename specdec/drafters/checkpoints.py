"""Checkpoints of networks that draft: a folder, or a repository of the hub, with `config.json` and weights."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

_CONFIG, _INDEX, _WEIGHTS = "config.json", ".index.json", ("model.safetensors", "pytorch_model.bin")
_SPECULATORS = "0.9.0"  # the release of speculators whose layout is written


class Checkpoint(NamedTuple):
    """What a folder holds: its `config.json`, and its tensors by name, on the CPU."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read a folder, or a repository of the Hugging Face hub, which is downloaded once.

    Raises:
        ValueError: there is no such folder or repository, a file is missing, or a pickle holds more than tensors.
    """
    folder = _folder(source)
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"There is no {_CONFIG} in {folder}; give the folder of a draft's checkpoint.")
    config, tensors = read_json(folder / _CONFIG), {}
    for file in _files(folder):
        tensors |= read_tensors(file)
    # frequencies of rotary positions follow from the config
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    return Checkpoint(config, kept)


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """A file that cannot be read is reported by its name."""
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file} holds more than tensors, and no code is run ({reason}). Get the checkpoint as safetensors."
        ) from None
    except (
        ArithmeticError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        SafetensorError,
    ) as error:
        raise ValueError(f"{file} is broken ({type(error).__name__}: {error}); download it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    """The keys of a file."""
    with _whole(file):
        return dict(json.loads(file.read_text("utf-8")))


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Errors of what is read here begin with where it was read."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, StrictDataclassError) as error:
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"{source}: its config or its tensors are not as such a draft has them ({said}).") from error


def write_checkpoint(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
    }  # some may share memory
    save_file(whole, folder / _WEIGHTS[0], metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def speculators_keys(method: str, tokens: int, target: PreTrainedModel) -> dict[str, Any]:
    """Keys that `config.json` has in the format of `speculators`, whatever the method.

    Args:
        method: by the name that `speculators` gives it.
        tokens: how many tokens engines draft in a step if they are not told.
        target: the target, which the file names.
    """
    proposal = {"speculative_tokens": tokens, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "speculators_model_type": method,
        "speculators_version": _SPECULATORS,
        "speculators_config": {
            "algorithm": method,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", **proposal}],
            "verifier": {"name_or_path": target.config.name_or_path, "architectures": [type(target).__name__]},
        },
    }


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Nothing that a pickle holds besides is run."""
    if not file.is_file():
        raise ValueError(f"There is no {file.name} in {file.parent}, which names it; download it again.")
    with _whole(file):
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))


def filled(
    net: Any, tensors: Mapping[str, Tensor], target_ids: Tensor | None, target: PreTrainedModel, source: str | Path
) -> Any:
    """A `StatesNet` with these tensors and target ids, in eval mode, in the target's dtype and on its device.

    Raises:
        ValueError: the tensors are not the ones it has; with their names.
    """
    _fill(net.to(target.dtype), tensors, source)
    net.target_ids = target_ids
    return net.to(target.device).eval()


def _fill(net: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Give a network these tensors. Raise ValueError, with their names, unless they are the ones it has."""
    wanted, named = net.state_dict(), ", ".join
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        parts = [f"lacks {named(missing)}"] * bool(missing) + [f"has {named(unexpected)} besides"] * bool(unexpected)
        raise ValueError(f"{source} {' and '.join(parts)}; give the checkpoint of a {type(net).__name__}.")
    for name, tensor in wanted.items():
        if (found := tensors[name].shape) != tensor.shape:
            raise ValueError(
                f"{source}: {name} is {list(found)}, and {list(tensor.shape)} goes with the other tensors."
            )
    net.load_state_dict(tensors)


def _folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    name, folder = str(source), Path()
    try:
        for weights in _WEIGHTS:  # pickles only where there is nothing else
            patterns = [_CONFIG, f"*{Path(weights).suffix}", f"*{_INDEX}"]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            if any(folder.glob(f"*{Path(weights).suffix}")):
                break
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} is neither a folder nor a repository that the hub gives: {reason}") from None
    return folder


def _files(folder: Path) -> list[Path]:
    """The files of weights, which an index names where there are several."""
    for weights in _WEIGHTS:
        if (folder / weights).is_file():
            return [folder / weights]
        if (index := folder / f"{weights}{_INDEX}").is_file():
            names = sorted(map(str, set(dict(read_json(index).get("weight_map", {})).values())))
            if not names or any(Path(name).name != name for name in names):
                raise ValueError(f"{index} names no files of its own folder ({', '.join(names)}); download it again.")
            return [folder / name for name in names]
    raise ValueError(f"There is neither {' nor '.join(_WEIGHTS)} in {folder}, nor an index of several such files.")
