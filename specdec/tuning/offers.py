"""The drafters that are compared: those that are given, and what the target itself offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_tuple, brief, wrong_kind
from specdec.drafters import Drafter, MedusaDrafter, MedusaHeads, ModelDrafter, MtpDrafter, NgramDrafter, SuffixDrafter
from specdec.models.target import Target
from specdec.tuning.conditions import Conditions

OWN = ("ngram", "suffix", "layers", "mtp")
_STEPS = 3  # that tell whether a drafter can draft for a target
_CURE = "pass a drafter, a draft model or Medusa heads"


@dataclass(frozen=True)
class Offer:
    """A drafter by name.

    Args:
        name: what tables call it.
        drafter: it, with the tree that it was given with.
    """

    name: str
    drafter: Drafter


def given(drafters: Any) -> list[Offer]:
    """The drafters that a user gives: one or several, by name or without. Models and heads are made drafters."""
    if drafters is None:
        return []
    alone = isinstance(drafters, (Drafter, PreTrainedModel, MedusaHeads))
    if isinstance(drafters, Mapping):
        named = [(str(name), drafter) for name, drafter in drafters.items()]
    else:
        several = (drafters,) if alone else as_tuple("drafters", drafters, "drafters", _CURE)
        named = [(_name(drafter), drafter) for drafter in several]
    names = [name for name, _ in named]
    numbered = [
        f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
    ]
    if taken := sorted({*numbered} & {*OWN, "autoregressive"}):
        raise ValueError(f"drafters named {', '.join(taken)}: the target's own are called so; choose other names.")
    return [Offer(name, as_drafter(name, drafter)) for name, (_, drafter) in zip(numbered, named, strict=True)]


def as_drafter(name: str, value: Any) -> Drafter:
    """The drafter itself, or one that is made of a model or of heads."""
    match value:
        case Drafter():
            return value
        case PreTrainedModel():
            return ModelDrafter(value)
        case MedusaHeads():
            return MedusaDrafter(value)
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


def fitting(offers: Sequence[Offer], prompt: Tensor, conditions: Conditions) -> tuple[list[Offer], dict[str, str]]:
    """The drafters that can draft a text of this prompt, found by drafting, and why the others cannot."""
    found, refused = [], {}
    for offer in offers:
        try:
            with conditions.stream([prompt], offer.drafter) as run:
                for _ in islice(run, _STEPS):
                    pass
            found.append(offer)
        except ValueError as error:
            refused[offer.name] = str(error)
    return found, refused


def _name(drafter: Any) -> str:
    match drafter:
        case PreTrainedModel():
            return "draft"
        case MedusaHeads():
            return "heads"
    name = type(drafter).__name__.removesuffix("Drafter").lower()
    return f"your {name}" if name in OWN else name
