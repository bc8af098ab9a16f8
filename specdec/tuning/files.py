"""Plans as files of YAML, from which drafters and rules are made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from transformers import PreTrainedModel

from specdec.arguments import as_target
from specdec.checks import as_ints, as_parents
from specdec.drafters import Drafter, LayerSkipDrafter, Paused, TreeDrafter
from specdec.models.target import Target
from specdec.rules import Rule
from specdec.sampling import Sampling
from specdec.tuning.conditions import named, rules
from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import ALONE
from specdec.tuning.offers import given, own_offers
from specdec.tuning.rows import Speedup, Verdict
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
        "speedup": Speedup(**{name: _estimate(numbers) for name, numbers in said["speedup"].items()}),
        "saved": said["table"],
        **{name: said[name] for name in ("verdict", "reason", "conditions")},
    }


def drafter_of(
    path: str | PathLike[str] | None, target: PreTrainedModel | Target, drafters: Any = None
) -> Drafter | None:
    """The drafter of a plan that was saved; None if it says to draft nothing. Arguments as for `Plan.load`."""
    whole, this = _read(path), named(as_target(target))
    if (made_for := whole["conditions"].get("target", this)) != this:
        raise ValueError(
            f"{path}: made for another target ({made_for}) than this one ({this}); run specdec.tune for it."
        )
    said = whole["drafter"]
    name = said["name"]
    if name == ALONE.name:
        return None
    made = _made(name, said, target, drafters)
    if said["parents"] is not None:
        if not isinstance(made, TreeDrafter):
            raise ValueError(f"{path}: {name} grew trees, and the {type(made).__name__} that is given does not.")
        made = made.with_tree(tree_of(as_parents(said["parents"])))
    return Paused(made) if said["paused"] and not isinstance(made, Paused) else made


def rule_of(path: str | PathLike[str] | None) -> Rule:
    """The rule of a plan that was saved."""
    return _RULES[_read(path)["rule"]]


def _made(name: str, said: Mapping[str, Any], target: PreTrainedModel | Target, drafters: Any) -> Drafter:
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


def _read(path: str | PathLike[str] | None) -> dict[str, Any]:
    """What a file says, with every field as `save` writes it."""
    import yaml

    if path is None:
        raise ValueError("there is no path of a plan: name the file that Plan.save wrote, plan.path=FILE.")
    try:
        said = yaml.safe_load(Path(path).read_text("utf-8"))
        wrong = [name for name, right in _FIELDS.items() if not right(said[name])]
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, ValueError, AttributeError):
        wrong = ["what it holds"]
    if wrong:
        raise ValueError(
            f"{path}: not a file that Plan.save of this version wrote ({_FORMAT}): {', '.join(wrong)}; run specdec.tune again."
        )
    return said


def _is_drafter(said: dict[str, Any]) -> bool:
    """Raises any error if parts are missing or of another kind."""
    if said["parents"] is not None:
        as_parents(said["parents"])
    if said["skip"] is not None:
        as_ints("skip", said["skip"], 0)
    return isinstance(said["name"], str) and isinstance(said["paused"], bool)


def _is_speedup(said: dict[str, Any]) -> bool:
    numbers = [each for each in (said["predicted"], said["measured"]) if each is not None]
    return len(said) == 2 and all(len(each) == 3 and float(each[0]) > 0 for each in numbers)


_RULES = {type(rule).__name__: rule for rule in rules(Sampling(1.0))}
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda said: said == _FORMAT,
    "drafter": _is_drafter,
    "rule": lambda said: said in _RULES,
    "verdict": lambda said: said in get_args(Verdict),
    "reason": lambda said: isinstance(said, str),
    "speedup": _is_speedup,
    "conditions": lambda said: isinstance(said, dict),
    "table": lambda said: isinstance(said, str),
}


def _numbers(found: Estimate | None) -> list[float | None] | None:
    return None if found is None else [found.value, found.low, found.high]


def _estimate(numbers: list[float | None] | None) -> Estimate | None:
    return None if numbers is None else Estimate(*numbers)  # type: ignore[arg-type] - the first is a number
