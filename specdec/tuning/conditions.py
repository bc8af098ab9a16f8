"""What every run of a search has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specdec.drafters import Drafter
from specdec.drafters.suffix_memory import Memory
from specdec.engines.base import Engine
from specdec.generate import Generation, Stream, stream
from specdec.models.memory import free_memory
from specdec.models.target import Target
from specdec.rules import BlockVerification, Rule, SiblingRejection, TraversalVerification
from specdec.sampling import Sampling

_FILTERS = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Conditions:
    """What every run of a search has in common.

    Args:
        target: the target.
        sampling: the sampling, with every field resolved.
        batch: rows.
        engine: makes the engine of a method: an engine keeps captured steps of one kind only.
        new_tokens: most of each text.
        tokenizer: of prompts, if there is one.
    """

    target: Target
    sampling: Sampling
    batch: int
    engine: Callable[[], Engine]
    new_tokens: int
    tokenizer: Any = None

    def stream(self, prompts: Sequence[Tensor], drafter: Drafter | None = None, **options: Any) -> Stream:
        """A run under these conditions, with an engine of its own unless one is given; arguments as for `generate`.

        No run drafts from what another has written, and the user's drafter learns nothing.
        """
        held = {"sampling": self.sampling, "tokenizer": self.tokenizer, "max_new_tokens": self.new_tokens}
        engine = options.pop("engine", None) or self.engine()
        drafter = None if drafter is None else afresh(drafter)
        return stream(self.target, list(prompts), drafter, engine=engine, **{**held, **options})

    def in_turn(
        self, prompts: Sequence[Tensor], last: Generation | None, engine: Engine, *args: Any, **options: Any
    ) -> Stream:
        """A run after another one over the same prompts. What the target has read of them is not read again, unless the drafter
        needs its states, or steps are captured, which read the caches that they were captured with.

        Args:
            last: the other run, if it was `kept`.
        """
        again = {} if engine.static_shapes else {"keep": True, "resume": last}
        return self.stream(prompts, *args, engine=engine, **again, **options)

    def kept(self, run: Generation) -> Generation | None:
        """The run, for the next one to go on from; None if that would not fit beside it."""
        free = free_memory(self.target.device)
        return None if run.runs is None or (free is not None and 2 * run.runs.bytes > free) else run


def rules(sampling: Sampling) -> list[Rule]:
    """Those that are compared: greedy decoding accepts the same by all of them."""
    if sampling.temperature == 0:
        return [SiblingRejection()]
    return [SiblingRejection(), BlockVerification(), TraversalVerification()]


def afresh(drafter: Drafter) -> Drafter:
    """The drafter with an empty memory in place of its own, which stays as it is; itself if it keeps nothing over runs."""
    parts = {
        name: Memory(part.most) if isinstance(part, Memory) else afresh(part)
        for name, part in vars(drafter).items()
        if isinstance(part, (Memory, Drafter))
    }
    if all(part is getattr(drafter, name) for name, part in parts.items()):
        return drafter
    made = copy(drafter)
    vars(made).update(parts)
    return made


def named(target: Target) -> str:
    """What tells a target from others, in words."""
    if target.model is None:
        return f"{type(target).__name__}, {target.vocab} tokens"
    layers = getattr(target.model.config.get_text_config(), "num_hidden_layers", "unknown")
    return f"{type(target.model).__name__}, layers: {layers}, {target.vocab} tokens"


def chosen(sampling: Sampling) -> str:
    """How tokens are chosen, in words."""
    if sampling.temperature == 0:
        said = ["greedy"]
    else:
        said = [f"{name} {value:g}" for name in _FILTERS if (value := getattr(sampling, name)) is not None]
    return ", ".join([*said, *(type(processor).__name__ for processor in sampling.processors)])
