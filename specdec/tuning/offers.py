"""The drafters that are compared: those that are given, and what the target itself offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import FunctionType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_tuple, brief, wrong_kind
from specdec.drafters import Drafter, MedusaDrafter, MedusaHeads, ModelDrafter, MtpDrafter, NgramDrafter, SuffixDrafter
from specdec.models.target import Target
from specdec.tuning.conditions import Conditions

OWN = ("ngram", "suffix", "layers", "mtp")
# Of a run that tells whether a drafter can draft for a target.
_STEPS = 3
_CURE = "pass a drafter, a draft model or Medusa heads, or a function that makes one"


@dataclass(frozen=True)
class Offer:
    """A drafter by name.

    Args:
        name: what tables call it.
        drafter: it, with the tree that it was given with.
    """

    name: str
    drafter: Drafter


def named(drafters: Any) -> dict[str, Any]:
    """What a user gives to draft with, one or several, by its names or by what it is."""
    if drafters is None:
        return {}
    alone = isinstance(drafters, (Drafter, PreTrainedModel, MedusaHeads, FunctionType, partial))
    if isinstance(drafters, Mapping):
        several = [(str(name), drafter) for name, drafter in drafters.items()]
    else:
        several = [
            (_name(each), each)
            for each in ((drafters,) if alone else as_tuple("drafters", drafters, "drafters", _CURE))
        ]
    names = [name for name, _ in several]
    numbered = [
        f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
    ]
    if taken := sorted({*numbered} & {*OWN, "autoregressive"}):
        raise ValueError(f"drafters named {', '.join(taken)}: the target's own are called so; choose other names.")
    return dict(zip(numbered, (drafter for _, drafter in several), strict=True))


def given(drafters: Any) -> list[Offer]:
    """The drafters that a user gives. Models and heads are made drafters."""
    return [Offer(name, as_drafter(name, drafter)) for name, drafter in named(drafters).items()]


def as_drafter(name: str, value: Any) -> Drafter:
    """The drafter itself, or one that is made of a model, of heads, or by a function that gives any of these."""
    match value:
        case Drafter():
            return value
        case PreTrainedModel():
            return ModelDrafter(value)
        case MedusaHeads():
            return MedusaDrafter(value)
        case FunctionType() | partial():
            return as_drafter(name, value())
    raise wrong_kind(f"the drafter {name!r}", value, _CURE)


def own_offers(target: Target, names: Sequence[str]) -> tuple[list[Offer], dict[str, str]]:
    """What the target itself offers without a search, and why the rest of it is not there."""
    names = as_tuple("own", names, "names", f"choose from {', '.join(OWN)}")
    if unknown := [name for name in names if name not in OWN]:
        raise ValueError(f"own={brief(names)}: there is no {unknown[0]!r}; choose from {', '.join(OWN)}.")
    found, refused = [], {}
    if "ngram" in names:
        found.append(Offer("ngram", NgramDrafter()))
    if "suffix" in names:
        found.append(Offer("suffix", SuffixDrafter()))
    if "mtp" in names and target.model is not None:
        try:
            found.append(Offer("mtp", MtpDrafter.from_target(target.model)))
        except (ValueError, OSError) as error:  # OSError: the repository cannot be reached
            refused["mtp"] = str(error)
    return found, refused


def fitting(drafters: Mapping[str, Any], prompt: Tensor, conditions: Conditions) -> tuple[list[Offer], dict[str, str]]:
    """Drafters that can draft a text of this prompt, found by making them and drafting, and why the others cannot."""
    found, refused = [], {}
    for name, value in drafters.items():
        try:
            drafter = as_drafter(name, value)
            with conditions.stream([prompt], drafter) as run:
                for _ in islice(run, _STEPS):
                    pass
            found.append(Offer(name, drafter))
        except Exception as error:  # whatever a stranger's drafter raises, the others are compared
            refused[name] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return found, refused


def _name(drafter: Any) -> str:
    match drafter:
        case PreTrainedModel():
            return "draft"
        case MedusaHeads():
            return "heads"
    name = type(drafter).__name__.removesuffix("Drafter").lower()
    return f"your {name}" if name in OWN else name
