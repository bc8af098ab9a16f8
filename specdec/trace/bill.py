"""A warning, once in a run, when drafting has taken more time than its drafts can have saved."""

from __future__ import annotations

import warnings

# Steps with a draft after which a run is judged.
STEPS = 200
# Those of them whose drafting took longest are not counted: they may have compiled or captured something, as happens once.
_LONGEST = 10
# Share of the time that must be lost. Less may be an error of the clock, or of the assumption below.
_LOST = 0.05


class CostlyDraftsWarning(UserWarning):
    """Drafting has taken more time than its drafts can have saved."""


class Bill:
    """What the drafts of a run have cost, and the most that they can have saved.

    How long a step without a draft takes is not known, as there may be none. But it does no more than one with a draft less
    its drafting: the same forward pass for fewer tokens. So a step that drafts have saved saved at most that. Drafts that are
    not said to cost more than they give may do so all the same, as the forward pass for their tokens does take longer.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[float, float, float]] = []

    def note(self, nodes: int, gained: float, drafting: float, rest: float) -> None:
        """Note a step, and warn if it completes the steps after which a run is judged and they were a loss.

        Args:
            nodes: size of its trees, the root included.
            gained: steps without a draft that would have brought the run as far: `Batch.gained`.
            drafting, rest: seconds of drafting and of all the rest.
        """
        if nodes == 1 or len(self._steps) == STEPS:
            return
        # a row that a stop token ends has not come nearer to its end by more than its tokens
        self._steps.append((min(gained, nodes) - 1, drafting, rest))
        if len(self._steps) == STEPS:
            self._settle()

    def _settle(self) -> None:
        saved, drafting, rest = map(list, zip(*self._steps, strict=True))
        cost = sum(sorted(drafting)[:-_LONGEST])
        gain = sum(saved) * sum(rest) / STEPS
        if cost - gain > _LOST * (sum(drafting) + sum(rest)):
            warnings.warn(
                f"Drafts have cost more time than they gave: in {STEPS} steps drafting took {cost:.3g} s, and the "
                f"{sum(saved):.0f} steps that it saved would have taken at most {gain:.3g} s. Wrap the drafter, "
                "specdec.drafters.Paused(drafter), which pauses drafts while they do not pay; or decode without one.",
                CostlyDraftsWarning,
                stacklevel=2,
            )
