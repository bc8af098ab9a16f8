"""How the stages of a step are run: here as they stand; `specdec.engines.graphs` captures and replays them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Stages:
    """Runs the stages of one run, every one as it stands."""

    static_shapes = False  # whether the shapes of a stage have to be the same in all steps
    compiles = False  # whether forward passes of steps are to be compiled

    def rounded(self, length: int) -> int:
        """Round a length of text up to one that stages are specialised on."""
        return length

    def perform(self, key: Hashable, stage: Callable[..., Any], reason: str | None, *args: Any) -> Any:
        """The result of a stage, or of a part of one.

        Args:
            key: all host values that the stage depends on, `Batch.longest` for instance.
            stage: a function with a name.
            reason: why it cannot be captured; None if it can.
            args: results of stages before it, or a frontier.
        """
        return stage(*args)


class Engine:
    """Runs every stage as it stands. An engine may serve any number of runs at once, from any thread."""

    captures = False  # whether it captures stages, and keeps what ended runs have owned

    def stages(self, device: torch.device) -> Stages:
        """What runs the stages of a new run on this device."""
        return Stages()

    def take(self, key: Any) -> Any:
        """What an ended run of this key has given back, for a new run alone; None if there is nothing."""
        return None

    def give_back(self, key: Any, parts: Any) -> None:
        """Offer what an ended run has owned to the next run of the same key."""
