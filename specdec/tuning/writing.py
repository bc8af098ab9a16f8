"""The texts that everything is foretold from: what the target makes of the prompts by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.checks import as_ints, as_tuple
from specdec.models.memory import DoesNotFit
from specdec.request import Request
from specdec.tuning.conditions import Conditions

# New tokens of the longest text: less tells little.
_SHORTEST = 16
# Most texts of a prompt.
_SAMPLES = 2
# Rows that write together, if they fit: a pass over so many takes little longer than over one.
_ROWS = 8


@dataclass(frozen=True)
class Written:
    """What the target wrote after a prompt.

    Args:
        prompt: its place among the prompts.
        sample: which of the texts of that prompt.
        new: [n] int64: the new tokens.
    """

    prompt: int
    sample: int
    new: Tensor


def as_written(texts: Any, request: Request, most: int) -> list[Written]:
    """What the target is said to have written after the prompts that are decoded, up to so many tokens of each."""
    cure = "pass for each prompt the new tokens that the target wrote, as in Generation.tokens"
    given = as_tuple("texts", texts, "texts", cure)
    if len(given) != request.count:
        raise ValueError(f"texts: there are {len(given)}, and {request.count} prompts; {cure}.")
    found = []
    for place, text in enumerate(request.texts):
        name, new = f"texts[{text.index}]", given[text.index]
        tokens = as_ints(name, new.tolist() if isinstance(new, Tensor) else new, 0, request.target.vocab - 1, cure=cure)
        if len(tokens) > 1:
            found.append(Written(place, 0, torch.tensor(tokens[:most])))
    if not found:
        raise ValueError(f"texts: none has two tokens or more, which say how drafts are accepted; {cure}.")
    return found


def write(
    found: list[Written],
    prompts: Sequence[Tensor],
    conditions: Conditions,
    over: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Add texts of all prompts, and where sampled further ones of all prompts, as far as time allows.

    What time or Ctrl-C cuts off is added all the same, as the target wrote it: some tokens are waited for.
    """
    # no steps of another shape are captured for it
    rows = conditions.batch if conditions.engine().static_shapes else max(conditions.batch, _ROWS)
    try:
        _write(found, prompts, conditions, rows, over, say)
    except (DoesNotFit, torch.OutOfMemoryError):
        if rows == conditions.batch:
            raise
        found.clear()
        _write(found, prompts, conditions, conditions.batch, over, say)


def _write(
    found: list[Written],
    prompts: Sequence[Tensor],
    conditions: Conditions,
    rows: int,
    over: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    shortest = min(_SHORTEST, conditions.new_tokens)
    for sample in range(1 if conditions.sampling.temperature == 0 else _SAMPLES):
        say("letting the target write")
        with conditions.stream(prompts, seed=sample, batch_size=rows) as run:
            try:
                for _ in run:
                    if over() and max(map(len, run.generation.tokens)) >= shortest:
                        break
            finally:
                made = run.generation.tokens
                found += [Written(i, sample, new) for i, new in enumerate(made) if len(new) > 1]
        if over():
            break
