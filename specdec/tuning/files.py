"""Plans as files of YAML, from which drafters and rules are made again."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from specdec import rules
from specdec.arguments import as_target
from specdec.drafters import Drafter, LayerSkipDrafter, Paused, TreeDrafter
from specdec.models.target import Target
from specdec.rules import Rule
from specdec.tuning.estimate import Estimate
from specdec.tuning.offers import given, own_offers
from specdec.tuning.rows import Speedup
from specdec.tuning.search import tree_of
from specdec.tuning.shapes import parents_of

if TYPE_CHECKING:
    from specdec.tuning.plan import Plan

_FORMAT = "specdec plan 1"


def save(plan: Plan, path: str | PathLike[str]) -> None:
    """Write a plan. Of the drafter, its name and its tree: the models are the user's."""
    import yaml  # here, as few need it

    made = {
        "format": _FORMAT,
        "drafter": _described(plan.name, plan.drafter),
        "rule": type(plan.rule).__name__,
        "verdict": plan.verdict,
        "reason": plan.reason,
        "speedup": {name: _numbers(getattr(plan.speedup, name)) for name in ("predicted", "measured")},
        "conditions": dict(plan.conditions),
        "table": plan.table(),
    }
    Path(path).write_text(yaml.safe_dump(made, sort_keys=False, default_flow_style=None, width=1000), "utf-8")


def load(path: str | PathLike[str], target: PreTrainedModel | Target, drafters: Any = None) -> dict[str, Any]:
    """The fields of a plan that was saved; arguments as for `Plan.load`."""
    said = _read(path)
    return {
        "name": said["drafter"]["name"],
        "drafter": drafter_of(path, target, drafters),
        "rule": rule_of(path),
        "speedup": Speedup(*(_estimate(said["speedup"][name]) for name in ("predicted", "measured"))),
        **{name: said[name] for name in ("verdict", "reason", "conditions")},
    }


def drafter_of(path: str | PathLike[str], target: PreTrainedModel | Target, drafters: Any = None) -> Drafter | None:
    """The drafter of a plan that was saved; None if it says to draft nothing. Arguments as for `Plan.load`."""
    said = _read(path)["drafter"]
    name = said["name"]
    if name == "autoregressive":
        return None
    made = _named(name, said, target, drafters)
    if said["parents"] is not None:
        if not isinstance(made, TreeDrafter):
            raise ValueError(f"{path}: {name} grew trees, and the {type(made).__name__} that is given does not.")
        made = made.with_tree(tree_of(said["parents"]))
    return Paused(made) if said["paused"] and not isinstance(made, Paused) else made


def rule_of(path: str | PathLike[str]) -> Rule:
    """The rule of a plan that was saved."""
    return getattr(rules, _read(path)["rule"])()


def _named(name: str, said: Mapping[str, Any], target: PreTrainedModel | Target, drafters: Any) -> Drafter:
    if said["skip"] is not None:
        return LayerSkipDrafter(skip=said["skip"])
    if isinstance(drafters, Mapping):  # what else is in it need not fit
        drafters = {key: value for key, value in drafters.items() if key == name and value is not None}
    found = {offer.name: offer.drafter for offer in given(drafters)}
    if name in ("ngram", "suffix", "mtp"):
        ours, refused = own_offers(as_target(target), [name])
        if name in refused:
            raise ValueError(refused[name])
        found |= {offer.name: offer.drafter for offer in ours}
    if name not in found:
        raise ValueError(f"The plan drafts with {name!r}, which is not given: pass drafters={{{name!r}: ...}}.")
    return found[name]


def _described(name: str, drafter: Drafter | None) -> dict[str, Any]:
    parents = parents_of(drafter)
    return {
        "name": name,
        "paused": isinstance(drafter, Paused),
        "skip": list(drafter.skip) if name == "layers" and isinstance(drafter, LayerSkipDrafter) else None,
        "parents": None if parents is None else list(parents),
    }


def _read(path: str | PathLike[str]) -> dict[str, Any]:
    import yaml

    said = yaml.safe_load(Path(path).read_text("utf-8"))
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: not a file that Plan.save of this version wrote ({_FORMAT!r}); run specdec.tune again."
        )
    return said


def _numbers(found: Estimate | None) -> list[float | None] | None:
    return None if found is None else [found.value, found.low, found.high]


def _estimate(numbers: list[float | None] | None) -> Estimate | None:
    return None if numbers is None else Estimate(*numbers)  # type: ignore[arg-type] - the first is a number
