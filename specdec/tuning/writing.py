"""The texts that everything is foretold from: what the target makes of the prompts by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from specdec.generate import stream
from specdec.tuning.measuring import Conditions

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


def written(
    prompts: Sequence[Tensor], conditions: Conditions, over: Callable[[], bool], say: Callable[[str], None]
) -> list[Written]:
    """Texts of all prompts, and where sampled further ones of all prompts, as far as time allows.

    What time cuts off is used all the same, as the target wrote it: some tokens are waited for.
    """
    found: list[Written] = []
    shortest = min(_SHORTEST, conditions.options["max_new_tokens"])
    samples = 1 if conditions.sampling.temperature == 0 else _SAMPLES
    for sample in range(samples):
        say("letting the target write")
        options = {**conditions.options, "sampling": conditions.sampling, "engine": conditions.engine()}
        with stream(conditions.target, list(prompts), seed=sample, **options) as run:
            for step, _ in enumerate(run):
                if over() and step + 1 >= shortest:
                    break
            made = run.generation.tokens
        found += [Written(i, sample, new) for i, new in enumerate(made) if len(new) > 1]
        if over():
            break
    return found
