"""The texts that everything is foretold from: what the target makes of the prompts by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.checks import as_ints, as_tuple
from specdec.request import Request
from specdec.tuning.conditions import Conditions

_SHORTEST = 16  # new tokens, or all that are wanted: less of a text tells little
_SAMPLES = 2  # most texts of a prompt


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


def written(
    prompts: Sequence[Tensor], conditions: Conditions, over: Callable[[], bool], say: Callable[[str], None]
) -> list[Written]:
    """Texts of all prompts, and where sampled further ones of all prompts, as far as time allows.

    What time cuts off is used all the same, as the target wrote it: some tokens are waited for.
    """
    found: list[Written] = []
    shortest = min(_SHORTEST, conditions.new_tokens)
    samples = 1 if conditions.sampling.temperature == 0 else _SAMPLES
    for sample in range(samples):
        say("letting the target write")
        with conditions.stream(prompts, seed=sample) as run:
            for step, _ in enumerate(run):
                if over() and step + 1 >= shortest:
                    break
            made = run.generation.tokens
        found += [Written(i, sample, new) for i, new in enumerate(made) if len(new) > 1]
        if over():
            break
    return found
