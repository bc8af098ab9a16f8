"""How the stages of a step are run: here as they stand; `specdec.engines.graphs` captures and replays them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Engine:
    """Runs every stage as it stands."""

    fixed = False  # whether the shapes of a stage have to be the same in all steps
    compiled = False  # whether forward passes are to be compiled
    run: object = None  # the run that began last, if `fixed`; set by the loop

    def rounded(self, length: int) -> int:
        """A length of text that the stages are told in place of this one, and not less."""
        return length

    def forget(self) -> None:
        """Make the next run begin with new buffers: parts of the last one may have others of their own by now."""

    def begin(self, device: torch.device, signature: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """A run begins on this device; returns its buffers.

        Args:
            signature: what buffers and stages depend on.
            make: makes the buffers.
        """
        return make()

    def perform(self, key: Hashable, stage: Callable[..., Any], reason: str | None, *args: Any) -> Any:
        """The result of a stage, or of a part of one.

        Args:
            key: what it depends on besides its name and the shapes of `args`, as `Context.longest`.
            stage: a function with a name.
            reason: why it cannot be captured; None if it can.
            args: results of stages before it, or a frontier.
        """
        return stage(*args)
