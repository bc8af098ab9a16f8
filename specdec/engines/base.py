"""How the stages of a step are run. Here they are called directly; `specdec.engines.graphs` captures and replays them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from specdec.engines.pool import Parts


class Stages:
    """Runs the stages of one run by calling them."""

    captures = False  # whether stages are captured, so that they may depend on no length of text
    bytes = 0  # of device memory that captured stages hold

    def begin(self) -> None:
        """Begin a run, in the stages of an earlier one perhaps."""

    def perform(self, key: Hashable, stage: Callable[..., Any], reason: str | None, *args: Any) -> Any:
        """Run a stage, or a part of one, and return its result.

        Args:
            key: all host values that the stage depends on, but for shapes.
            stage: a function with a name.
            reason: why it cannot be captured; None if it can.
            args: results of earlier stages, or a frontier.
        """
        return stage(*args)


class Engine:
    """Runs stages by calling them. An engine may serve any number of runs at once, from any thread."""

    static_shapes = False  # whether all steps of a run have the same shapes, and its parts are kept when it ends
    compiles = False  # whether forward passes of steps are compiled

    def room(self, longest: int) -> int:
        """How many slots texts of up to so many tokens get. If it is rounded up, runs of nearly equal lengths share parts."""
        return longest

    def stages(self, device: torch.device) -> Stages:
        """The `Stages` of a new run on this device."""
        return Stages()

    def take(self, key: Any) -> Any:
        """Take the parts that an ended run of this key has given back; None if there are none. No other run gets them."""
        return None

    def give_back(self, key: Any, parts: Parts) -> None:
        """Offer the parts of an ended run to the next run of the same key."""

    def drop(self) -> bool:
        """Free all that ended runs have given back; whether there was anything."""
        return False
